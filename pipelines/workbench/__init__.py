"""What `pipelines/project.py` and the commands stand on: stages and their states, runs in folders of their own, how
they look, comparing, keeping and proposing them."""
