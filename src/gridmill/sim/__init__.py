"""The whole network on a clock of its own: real programs, fake cables, every fault from one seed."""
