"""`python -m fusechat_distill`, which is what `accelerate launch -m` starts."""

from fusechat_distill.cli import main

if __name__ == "__main__":
    main()
