// Shared code of the kernels for Hopper GPUs (sm_90a): barriers in shared memory, copies to it, and half precision.
// If BFLOAT16 is 1, half-precision numbers are bfloat16, otherwise float16.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARPGROUP = 128;

// ---- barriers in shared memory ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

// Make new barriers visible to other threads and to copies.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// Wait until the barrier's phase of this number, counted from 0, is complete; the previous phase must be complete already.
__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address(barrier)), "r"(phase & 1) : "memory");
}

// Wait for the previous kernel, which may run until here; its results may be read afterwards.
__device__ __forceinline__ void wait_for_the_last_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_the_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void synchronize_warpgroup(int warpgroup) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(WARPGROUP) : "memory");
}

// ---- clusters ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

// Wait until all threads of the cluster have arrived, which show their barriers before.
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Write to the shared memory of a thread block of the cluster, at the place `to` in it, and count the bytes at the barrier there.
__device__ __forceinline__ void send(const void* to, u64* barrier, int block, float2 value) {
    asm volatile(
        "{.reg .b32 place, sent;\n"
        "mapa.shared::cluster.u32 place, %0, %2;\n"
        "mapa.shared::cluster.u32 sent, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [place], {%3, %4}, [sent];}" ::"r"(address(to)),
        "r"(address(barrier)), "r"(block), "f"(value.x), "f"(value.y) : "memory");
}

// ---- the tensor memory accelerator ------------------------------------------------------------------------------------------------

struct alignas(64) TensorMap { char bytes[128]; };

__device__ __forceinline__ void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Copy a box of a tensor of five dimensions, the innermost first, to shared memory. The pieces of 16 bytes are permuted there, in rows
// of 128 or of 32 bytes.
__device__ __forceinline__ void load(
    const TensorMap* map, void* to, u64* barrier, int first, int second, int third, int fourth, int fifth) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
            address(to)), "l"(map), "r"(address(barrier)), "r"(first), "r"(second), "r"(third), "r"(fourth), "r"(fifth) : "memory");
}

// ---- the tensor cores -------------------------------------------------------------------------------------------------------------

// Descriptor of a matrix with rows of 128 or 32 bytes in shared memory, as `load` writes it. It counts in units of 16 bytes.
template <int row_bytes = 128>
__device__ __forceinline__ u64 matrix(const void* block) {
    static_assert(row_bytes == 128 || row_bytes == 32);
    return (u64)(address(block) >> 4 & 0x3FFF) | (u64)(8 * row_bytes >> 4) << 32 | (row_bytes == 128 ? 1ull : 3ull) << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all but the last `pending` groups of products are complete.
template <int pending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Make what this thread has written to shared memory visible to products, and to copies from there.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keep the compiler from moving accesses to registers that asynchronous products read or write: used before and after.
template <int count>
__device__ __forceinline__ void compiler_fence(float (&registers)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int count>
__device__ __forceinline__ void compiler_fence(u32 (&registers)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

// ---- numbers ----------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ __forceinline__ float2 unpack_float16(u32 both) {
    float2 found;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(found.x), "=f"(found.y) : "r"(both));
    return found;
}

__device__ __forceinline__ float2 unpack(u32 both) {
#if BFLOAT16
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000));
#else
    return unpack_float16(both);
#endif
}

// tanh(f(x)) of two numbers in float16, which is as exact as the instruction, where GELU(x) = (1 + tanh(f(x))) x / 2: as in
// `_fitted_gelu` of kernels/linear_triton.py. The constants are pairs of float16 numbers, for x or for half of it.
template <u32 largest_square, u32 fifth, u32 third, u32 first>
__device__ __forceinline__ float2 fitted_tanh(float low, float high) {
    u32 tanh;
    asm("{.reg .b32 x, square, inner;\n"
        "cvt.rn.f16x2.f32 x, %2, %1;\n"
        "mul.f16x2 square, x, x;\n"
        "min.f16x2 square, square, %3;\n"
        "fma.rn.f16x2 inner, square, %4, %5;\n"
        "fma.rn.f16x2 inner, inner, square, %6;\n"
        "mul.f16x2 inner, inner, x;\n"
        "tanh.approx.f16x2 %0, inner;}"
        : "=r"(tanh)
        : "f"(low), "f"(high), "r"(largest_square), "r"(fifth), "r"(third), "r"(first));
    return unpack_float16(tanh);
}

// GELU of two numbers, given half of each.
__device__ __forceinline__ void fitted_gelu(float& low, float& high) {
    // 6.25, 32 * -3.522957060e-04, 8 * 3.701044177e-02, 2 * 7.975026134e-01
    float2 tanh = fitted_tanh<0x46404640, 0xA1C6A1C6, 0x34BD34BD, 0x3E613E61>(low, high);
    low = fmaf(low, tanh.x, low), high = fmaf(high, tanh.y, high);
}

// Read 16 bytes of shared memory here and not before: the compiler would read ahead, and spill registers.
__device__ __forceinline__ uint4 read_shared(u32 address) {
    uint4 found;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
        : "r"(address)
        : "memory");
    return found;
}

// Reductions over the four threads that share a row.
__device__ __forceinline__ float sum_of_four_threads(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

__device__ __forceinline__ float maximum_of_four_threads(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
