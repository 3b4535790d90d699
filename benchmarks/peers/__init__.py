"""What people write today for the same job: whole scripts, to be measured beside `run_study.py`."""
