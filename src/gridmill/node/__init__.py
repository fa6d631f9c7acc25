"""Program two: what a provider runs."""
