"""Figures that papers print, to stand beside ours; no result of ours ever comes from here.

Of arXiv:2406.14539, Tables 1, 2 and 5; those that one benchmark alone shows are in its file.
"""

TABLE_2 = {  # row -> LPIPS, DinoV2, PSNR on 5K pairs of COCO; there is no D
    "DDIM-50": (0.167, 0.834, 22.98),
    "A": (0.332, 0.632, 17.75),
    "B": (0.317, 0.649, 18.42),
    "C": (0.276, 0.715, 19.19),
    "E": (0.484, 0.554, 16.40),
    "F": (0.248, 0.728, 20.01),
    "G": (0.198, 0.837, 22.27),
    "DDIM-50, guided": (0.479, 0.534, 14.12),
    "DDIM-50 + d.CFG": (0.279, 0.726, 19.58),
    "H": (0.476, 0.550, 13.87),
    "I": (0.370, 0.650, 16.72),
    "J": (0.317, 0.698, 17.98),
    "K": (0.273, 0.749, 19.66),
}

TABLE_5 = {"3 steps": (0.192, 0.841, 22.21), "3 steps, w 8 + d.CFG": (0.263, 0.770, 19.76)}
"""LPIPS, DinoV2, PSNR."""

GUIDANCES = ("none", "tau 0.6", "tau 0.8", "full")
TABLE_1 = {  # decoder's guidance -> FID on 5K pictures for the encoder's GUIDANCES
    "none": (11.0, 36.6, 63.4, 100.5),
    "tau 0.6": (11.4, 23.5, 67.8, 102.6),
    "tau 0.8": (15.0, 14.6, 52.2, 108.5),
    "full": (19.0, 19.2, 19.0, 102.1),
}
TABLE_1_NLL = (1.401, 1.409, 1.415, 1.428)
"""Latent NLL per dimension for the encoder's GUIDANCES."""
