"""From video files to uint8 clips."""
