// The three single headers stand beside each other in one file.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec-core.hpp>
#include <taskvec/taskvec-io.hpp>
#include <taskvec/taskvec.hpp>
