"""Tests never reach a hub, and never share cores they do not have."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from a second, and stages started here inherit it
