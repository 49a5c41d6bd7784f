"""What the commands share: the cases and their arrays, the contestants, the timing, the output."""
