"""The shared language of network and node: no database, no model, no engine."""
