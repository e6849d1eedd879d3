"""What teachers say, written to disk once and read back in every epoch."""
