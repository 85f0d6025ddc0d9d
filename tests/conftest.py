"""Its place puts tests/ on the import path of every test: cases.py, oracle.py, sealed_runs.py."""
