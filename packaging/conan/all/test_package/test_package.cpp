// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

int main()
{
    const std::vector<float> base{1, 1};
    const std::vector<std::vector<float>> tasks{{3, 1}, {1, 5}};
    std::vector<float> merged(2);
    taskvec::merge(taskvec::cpu{.threads = 1}, taskvec::task_arithmetic_options{.lambda = 0.5}, base, tasks, merged);
    return merged == std::vector<float>{2, 3} ? 0 : 1;
}
