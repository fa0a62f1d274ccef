"""What a run will need, known before it is paid for."""
