"""Faults under load: `make chaos SEED=... MINUTES=...`.

machine.py is the proxy on four GPUs that are not there, load.py the requests that go on meanwhile,
client.py and judge.py who reads their answers and what is right, faults_*.py what goes wrong,
audit.py what must hold after each fault, driver.py the order of it all, report.py the table.
"""
