"""`python -m icd_lightning`, as torchrun and clusters start modules, is `icd`."""

from icd_lightning.commands.main import main

if __name__ == "__main__":  # workers that are spawned import it too
    main()
