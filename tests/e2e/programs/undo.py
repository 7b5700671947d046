"""Does something to the capture of the pod that it runs in, by a command of the shell, and waits until all of it stands as
before: prints the milliseconds that took."""

import subprocess
import sys
import time

# All that may be taken away, without what counts.
PARTS = """
nft --stateless list ruleset
ip rule; ip -6 rule
ip route show table 27245; ip -6 route show table 27245
tc filter show dev eth0 egress; tc filter show dev lo egress
ss --no-header --tcp --listening --numeric '( sport = :15001 or sport = :15006 )' | awk '{print $4}' | sort
"""


def standing():
    return subprocess.run(["sh", "-c", PARTS], capture_output=True, text=True, timeout=10).stdout


before = standing()
since = time.monotonic()
subprocess.run(["sh", "-ec", sys.argv[1]], check=True, stdout=subprocess.DEVNULL, timeout=10)
while (now := standing()) != before:
    if time.monotonic() - since > 10:
        sys.exit(f"it is not undone:\n{now}\nand not\n{before}")
print(f"{(time.monotonic() - since) * 1000:.0f}", flush=True)
