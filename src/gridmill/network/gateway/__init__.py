"""One file per public API; nothing else knows that these APIs exist."""
