"""What turns one Work into events. Each engine passes `base.check_engine`."""
