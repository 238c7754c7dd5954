"""`python -m fallline.cli`."""

from fallline.cli import main

if __name__ == "__main__":
    main()
