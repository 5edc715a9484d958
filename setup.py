"""`pip install .` ends in this line: the names of the tool's modules would clash with others'."""

raise SystemExit("DeepLabv3 runs where it is: pip install -r requirements.txt && python main.py --help")
