"""Program one: the gateway, the registry and the dispatcher. Never imports torch."""
