// softmax(scale q k^T) v within the groups of dilated attention, on Hopper GPUs: the kernel of attention.py, which defines the
// names in capitals. q, k and v have 64 features and are side by side in a token's row, head by head; the tokens of a group are
// DILATION rows apart in a segment. If PER_HEAD, a head attends in one of a segment's groups and is zero in the others.
//
// A thread block has WARPGROUPS * 64 queries of a group, 64 per warpgroup, and reads all keys, KEYS at a time. Sums and the
// softmax are float32. While some warpgroups compute exponentials, the tensor cores work for the others.

#include "common.cuh"

constexpr int DIM = 64, KEYS = 128, BLOCKS = GROUP / KEYS, QUERIES = WARPGROUPS * 64, TILES = (GROUP + QUERIES - 1) / QUERIES;
// Whether a block's softmax weights are computed while the previous block's values are multiplied, which takes more registers.
constexpr bool AHEAD = WARPGROUPS == 3;
// Memory is reused LAG blocks after its last use: by then the other warpgroups have probably finished with it, too.
constexpr int LAG = WARPGROUPS > 1 ? 2 : 1;
constexpr u32 BLOCK_BYTES = KEYS * DIM * 2, QUERY_BYTES = QUERIES * DIM * 2;

struct Shared {
    char queries[QUERY_BYTES];
    char keys[STAGES][BLOCK_BYTES], values[STAGES][BLOCK_BYTES];
    u64 queries_loaded, keys_loaded[STAGES], values_loaded[STAGES], used[STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES);

// The place of a group's q, k and v.
struct Group {
    int head, offset, segment;

    __device__ __forceinline__ void load_queries(Shared& shared, const TensorMap* map, int first) {
        arrive_and_expect(&shared.queries_loaded, QUERY_BYTES);
        load(map, shared.queries, &shared.queries_loaded, 0, first, offset, 3 * head, segment);
    }

    __device__ __forceinline__ void load_block(Shared& shared, const TensorMap* map, int block) {
        int stage = block % STAGES;
        arrive_and_expect(&shared.keys_loaded[stage], BLOCK_BYTES);
        load(map, shared.keys[stage], &shared.keys_loaded[stage], 0, block * KEYS, offset, 3 * head + 1, segment);
        arrive_and_expect(&shared.values_loaded[stage], BLOCK_BYTES);
        load(map, shared.values[stage], &shared.values_loaded[stage], 0, block * KEYS, offset, 3 * head + 2, segment);
    }
};

__device__ __forceinline__ float power_of_two(float x) {
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}

#define MINUS_INFINITY __int_as_float(0xFF800000)

// Start computing the scores of 64 queries and the block's keys; they are complete after wait_for_products.
__device__ __forceinline__ void multiply_queries(Shared& shared, float (&scores)[KEYS / 2], u64 queries, int block) {
    wait(&shared.keys_loaded[block % STAGES], block / STAGES);
    u64 keys = matrix(shared.keys[block % STAGES]);
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) scores[i] = 0;
    compiler_fence(scores);
    begin_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) query_key_product(scores, queries + 2 * k, keys + 2 * k);
    commit_products();
}

// A thread's state of the softmax of its two queries.
struct Softmax {
    float reference[2] = {MINUS_INFINITY, MINUS_INFINITY}, totals[2] = {}, factors[2];
    bool grown[2];

    // Turn scores into weights relative to a reference: the largest score so far, or an earlier one if it has grown little since.
    __device__ __forceinline__ void weigh(u32 (&weights)[KEYS / 4], const float (&scores)[KEYS / 2], float scale) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float largest = reference[row];
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) largest = fmaxf(largest, scores[i / 2 * 4 + row * 2 + i % 2]);
            largest = maximum_of_four_threads(largest);
            grown[row] = __any_sync(0xFFFFFFFF, (largest - reference[row]) * scale > 8);
            if (grown[row]) {
                factors[row] = power_of_two((reference[row] - largest) * scale);
                reference[row] = largest, totals[row] *= factors[row];
            }
            float shift = -reference[row] * scale;
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++) {
                float low = power_of_two(fmaf(scores[i * 4 + row * 2], scale, shift));
                float high = power_of_two(fmaf(scores[i * 4 + row * 2 + 1], scale, shift));
                totals[row] += low + high;
                weights[i * 2 + row] = pack(low, high);
            }
        }
    }

    // Rescale sums of values whose weights were relative to an earlier reference.
    __device__ __forceinline__ void rescale(float (&sums)[DIM / 2]) {
#pragma unroll
        for (int row = 0; row < 2; row++)
            if (grown[row])
#pragma unroll
                for (int i = 0; i < DIM / 4; i++) sums[i / 2 * 4 + row * 2 + i % 2] *= factors[row];
    }
};

extern "C" __global__ void __launch_bounds__(WARPGROUP * WARPGROUPS, 4 - WARPGROUPS) NAME(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap block_map, u32* output, float scale) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *(Shared*)memory;
    int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
    int first = blockIdx.x % TILES * QUERIES, number = blockIdx.x / TILES;
    Group group = {number % HEADS, number / HEADS % DILATION, number / (HEADS * DILATION)};
    if (PER_HEAD) group.offset = group.head % DILATION, group.segment = number / HEADS;
    // The number of warpgroups that have queries.
    int warpgroups = min(WARPGROUPS, (GROUP - first) / 64);
    if (threadIdx.x == 0) {
        prefetch(&query_map), prefetch(&block_map);
        make_barrier(&shared.queries_loaded, 1);
        for (int stage = 0; stage < STAGES; stage++) {
            make_barrier(&shared.keys_loaded[stage], 1);
            make_barrier(&shared.values_loaded[stage], 1);
            make_barrier(&shared.used[stage], 4 * warpgroups);
        }
        show_barriers();
        wait_for_the_last_kernel();
        let_the_next_kernel_begin();
        group.load_queries(shared, &query_map, first);
        for (int block = 0; block < min(STAGES, BLOCKS); block++) group.load_block(shared, &block_map, block);
    }
    __syncthreads();
    if (warpgroup >= warpgroups) return;

    // A thread has two of 64 queries, `lane / 4` and `lane / 4 + 8` of its warp's 16, and two of every eight columns of them.
    float sums[DIM / 2] = {}, scores[KEYS / 2];
    Softmax softmax;
    u32 weights[KEYS / 4];
    u64 queries = matrix(shared.queries + warpgroup * 64 * DIM * 2);
    wait(&shared.queries_loaded, 0);

    auto load_ahead = [&](int block) {
        int next = block - LAG + STAGES;
        if (threadIdx.x == 0 && block >= LAG && next < BLOCKS) {
            wait(&shared.used[next % STAGES], next / STAGES - 1);
            group.load_block(shared, &block_map, next);
        }
        __syncwarp();
    };
    auto weigh_block = [&](int block) {
        multiply_queries(shared, scores, queries, block);
        wait_for_products<0>();
        compiler_fence(scores);
        softmax.weigh(weights, scores, scale);
        softmax.rescale(sums);
    };
    auto wait_for_values = [&](int block) { wait(&shared.values_loaded[block % STAGES], block / STAGES); };
    auto multiply_values = [&](int block) {
        if (!AHEAD || block == 0) wait_for_values(block);  // otherwise they have already been waited for
        u64 values = matrix(shared.values[block % STAGES]);
        compiler_fence(sums), compiler_fence(weights);
        begin_products();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)  // 16 keys further on are 16 rows of 128 bytes
            weight_value_product(sums, weights[k * 4], weights[k * 4 + 1], weights[k * 4 + 2], weights[k * 4 + 3], values + 128 * k);
        commit_products();
    };
    auto end_values = [&]() {
        wait_for_products<0>();
        compiler_fence(sums), compiler_fence(weights);
    };

    if (AHEAD) weigh_block(0);
    for (int block = 0; block < BLOCKS - AHEAD; block++) {
        load_ahead(block);
        if (AHEAD) {
            u32 next[KEYS / 4];
            multiply_queries(shared, scores, queries, block + 1);
            multiply_values(block);
            wait_for_products<1>();
            compiler_fence(scores);
            softmax.weigh(next, scores, scale);  // while the values are being multiplied
            wait_for_values(block + 1);  // keeps the compiler from moving the wait for products before the exponentials
            end_values();
            softmax.rescale(sums);
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) weights[i] = next[i];
        } else {
            weigh_block(block);
            multiply_values(block);
            end_values();
        }
        if (lane == 0) arrive(&shared.used[block % STAGES]);
    }
    if (AHEAD) multiply_values(BLOCKS - 1), end_values();

#pragma unroll
    for (int row = 0; row < 2; row++) {
        float factor = 1 / sum_of_four_threads(softmax.totals[row]);
        int query = first + warpgroup * 64 + thread / 32 * 16 + row * 8 + lane / 4;
        auto row_of = [&](int offset) {
            u64 token = (u64)group.segment * (GROUP * DILATION) + query * DILATION + offset;
            return output + (token * HEADS + group.head) * (DIM / 2) + lane % 4;
        };
        u32* to = row_of(group.offset);
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) to[i * 4] = pack(sums[i * 4 + row * 2] * factor, sums[i * 4 + row * 2 + 1] * factor);
        for (int other = 1; PER_HEAD && other < DILATION; other++) {
            u32* zeros = row_of((group.offset + other) % DILATION);
#pragma unroll
            for (int i = 0; i < DIM / 8; i++) zeros[i * 4] = 0;
        }
    }
}
