# SPDX-License-Identifier: Apache-2.0
"""score.py SOCKET MODEL: asks experiments.py, which has the texts in memory, for a model's score. For `taskvec sweep --score` and its like."""
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(f"{sys.argv[2]}\t{os.environ.get('TASKVEC_WEIGHTS', '')}\n".encode())
    answer = connection.makefile().readline().strip()
if not answer:
    sys.exit("score.py: the scoring failed; see the output of scripts/reproduce")
print(answer)
