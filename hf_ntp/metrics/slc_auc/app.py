"""Metric Space: the interactive page that `evaluate` makes of the module."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("slc_auc.py"))
