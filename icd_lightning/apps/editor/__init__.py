"""The web editor. `icd app` serves it here; a Space's `app.py` is:

from icd_lightning import InvertibleConsistencyPipeline
from icd_lightning.apps.editor.page import EditorPage
EditorPage(InvertibleConsistencyPipeline.from_pretrained("tiny")).launch()
"""
