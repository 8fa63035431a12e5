// Where log-sum-exps go of a kernel that has no such output: nowhere, by a test that no compiler can decide. NVIDIA's, if it
// knew, would give each thread more registers, and two groups instead of three would fit on a core of a Hopper.
#define LOGARITHMS (lengths_shape[0] < 0 ? (device float*)y : (device float*)nullptr)
