"""Figures that papers print, to stand beside ours; no result of ours ever comes from here.

Sources: arXiv:2406.14539 (Tables 1 to 5) and, for PIE-Bench with Prompt-to-Prompt, arXiv:2310.01506.
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

TABLE_4 = {  # FID, CLIP, ImageReward
    "DDIM-50": (18.73, 0.266, 0.201),
    "CD4": (18.45, 0.259, 0.044),
    "CD3": (17.96, 0.258, -0.009),
    "CD4, tau 0.8": (16.25, 0.254, -0.193),
    "CD4, tau 0.7": (16.38, 0.253, -0.217),
    "CD3, tau 0.7": (17.66, 0.251, -0.351),
}

GUIDANCES = ("none", "tau 0.6", "tau 0.8", "full")
TABLE_1 = {  # decoder's guidance -> FID on 5K pictures for the encoder's GUIDANCES
    "none": (11.0, 36.6, 63.4, 100.5),
    "tau 0.6": (11.4, 23.5, 67.8, 102.6),
    "tau 0.8": (15.0, 14.6, 52.2, 108.5),
    "full": (19.0, 19.2, 19.0, 102.1),
}
TABLE_1_NLL = (1.401, 1.409, 1.415, 1.428)
"""Latent NLL per dimension for the encoder's GUIDANCES."""

TABLE_3 = {  # benchmark -> method -> CLIP-T, Dino, CLIP-I
    "coco_edit": {
        "iCD-XL": (0.267, 0.472, 0.748),
        "ReNoise, Turbo": (0.265, 0.399, 0.705),
        "ReNoise, SDXL": (0.227, 0.431, 0.732),
        "ReNoise, LCM": (0.218, 0.350, 0.663),
    },
    "piebench": {
        "iCD-XL": (0.254, 0.707, 0.858),
        "ReNoise, Turbo": (0.254, 0.615, 0.820),
        "ReNoise, SDXL": (0.234, 0.642, 0.835),
        "ReNoise, LCM": (0.236, 0.736, 0.865),
    },
}
PIE_BENCH = {  # structure e-3, PSNR, LPIPS e-3, MSE e-4, SSIM e-2, CLIP whole, CLIP edited
    "ddim": (69.43, 17.87, 208.80, 219.88, 71.14, 25.01, 22.44),
    "null-text": (13.44, 27.03, 60.67, 35.86, 84.11, 24.75, 21.86),
    "negative-prompt": (16.17, 26.21, 69.01, 39.73, 83.40, 24.61, 21.87),
    "pnp-inversion": (11.65, 27.22, 54.55, 32.86, 84.76, 25.02, 22.10),
}

TABLE_3_TITLE = "arXiv:2406.14539, Table 3, SDXL"
TABLE_3_COLUMNS = ("CLIP-T", "Dino", "CLIP-I")

PUBLISHED = {  # benchmark -> tables: title, columns, rows
    "inversion": (("arXiv:2406.14539, Tables 2 and 5, SD1.5", ("LPIPS", "DinoV2", "PSNR"), TABLE_2 | TABLE_5),),
    "generation": (("arXiv:2406.14539, Table 4, SD1.5", ("FID", "CLIP", "ImageReward"), TABLE_4),),
    "coco_edit": ((TABLE_3_TITLE, TABLE_3_COLUMNS, TABLE_3["coco_edit"]),),
    "piebench": (
        (
            "arXiv:2310.01506, SD1.5, all 700 pictures, edits by Prompt-to-Prompt",
            ("structure, e-3", "PSNR", "LPIPS, e-3", "MSE, e-4", "SSIM, e-2", "CLIP, whole", "CLIP, edited"),
            PIE_BENCH,
        ),
        (f"{TABLE_3_TITLE}, 420 natural pictures", TABLE_3_COLUMNS, TABLE_3["piebench"]),
    ),
}
