"""`python -m video_ma2mba.small` is the small run."""

from video_ma2mba.small.app import run

run()
