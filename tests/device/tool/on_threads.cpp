// The tool's device file for host threads: a tool whose --device cuda runs on Thrust's OMP system.
// SPDX-License-Identifier: Apache-2.0
#include "../../../tools/device/cuda.cu"
