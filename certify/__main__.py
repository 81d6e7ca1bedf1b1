"""`python -m certify`: the same commands as `hawthorn certify`, without Flower."""

from certify.cli import app

if __name__ == "__main__":
    app(prog_name="python -m certify")
