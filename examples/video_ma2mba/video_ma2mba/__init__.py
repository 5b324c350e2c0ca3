"""Video-Ma²mba: from raw video to benchmark scores, with magc under a real model."""
