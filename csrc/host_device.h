// Marks for functions that are compiled for host and device, or by nvcc for the device alone.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#define ON_DEVICE __device__
#else
#define HOST_DEVICE
#define ON_DEVICE
#endif
