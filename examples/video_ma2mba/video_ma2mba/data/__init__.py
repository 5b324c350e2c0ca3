"""From annotation files and videos to token sequences with the frames they refer to."""
