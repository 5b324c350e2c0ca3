"""The whole of Video-Ma²mba in miniature: `python -m video_ma2mba.small`."""
