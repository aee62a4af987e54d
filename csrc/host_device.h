// Qualifiers of functions that run on host and device, or, where nvcc compiles them, on the device alone.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#define ON_DEVICE __device__
#else
#define HOST_DEVICE
#define ON_DEVICE
#endif
