"""`python -m haq_lab [group=option ...] [group.setting=value ...]`: one run, or with `-m` a sweep."""

from haq_lab.cli.main import main

if __name__ == "__main__":
    main()
