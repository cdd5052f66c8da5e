"""``python -m llmsparse``: the command line, as `accelerate launch -m llmsparse` starts it."""

from llmsparse.cli import app

if __name__ == "__main__":
    app(prog_name="llmsparse")
