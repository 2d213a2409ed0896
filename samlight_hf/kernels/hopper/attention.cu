// w v / sum(w) with weights w = 2^(q k^T), within the groups of dilated attention, on Hopper GPUs: the kernel of attention.py, which
// defines the names in capitals. q, k and v have 64 features and are side by side in a token's row, head by head; the tokens of a
// group are DILATION rows apart in a segment. If PER_HEAD, a head attends in one of a segment's groups and is zero in the others.
//
// A thread block has WARPGROUPS * 64 queries of a group, 64 per warpgroup, and reads all keys, KEYS at a time. Sums and the
// softmax are float32. The tensor cores work while powers are computed, of other warpgroups and of the same one. They slow other
// instructions down, so there are few of these: the tensor cores also add up the weights, as products with ones, and bfloat16, whose
// exponents are those of float32, has room for the weights of usual scores as they are. A second pass over all keys follows if the
// weights of a query were too large or too small together. It computes them relative to the largest score, as float16 always needs,
// which is looked for only where scores have grown.

#include "common.cuh"

constexpr int DIM = 64, KEYS = 128, BLOCKS = GROUP / KEYS, QUERIES = WARPGROUPS * 64, TILES = (GROUP + QUERIES - 1) / QUERIES;
// Scores of STEP keys are computed at a time: of a block, or, if AHEAD, of half a block during the exponentials of the last half,
// which takes more registers. The values of PART keys are multiplied during the next exponentials.
constexpr int STEP = AHEAD ? KEYS / 2 : KEYS, PART = AHEAD ? STEP : STEP / 4;
// Memory is reused LAG blocks after its last use: by then the other warpgroups have probably finished with it, too.
constexpr int LAG = AHEAD ? 2 : 1;
constexpr u32 BLOCK_BYTES = KEYS * DIM * 2, QUERY_BYTES = QUERIES * DIM * 2;
// Columns of products with values: the features, and the sum of weights, eight times.
constexpr int COLUMNS = DIM + 8;
// The least and largest sum of weights that are not relative. If a sum of 4096 weights is more than the least one, the largest weight is
// more than 2^-92, and those that are rounded to zero are below 2^-126. Products with values overflow only for values above 2^47.
constexpr float LARGEST_SUM = 0x1p80f, LEAST_SUM = 0x1p-80f;
// A relative weight is 2^-MARGIN for a score that equals the reference, and less than 1 for all scores. Float16 has no weights below
// 2^-25. Beside one large score, thousands of weights that are lost there would be missed, so the margin is small.
constexpr float MARGIN = BFLOAT16 ? 8 : 2;

struct Shared {
    char queries[QUERY_BYTES];
    char keys[STAGES][BLOCK_BYTES], values[STAGES][BLOCK_BYTES];
    u32 ones[16 * DIM / 2];  // pairs: further columns of 16 values
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

    __device__ __forceinline__ void load_block(Shared& shared, const TensorMap* map, int block, int stage) {
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

// Start computing the scores of 64 queries and STEP keys; they are complete after wait_for_products.
__device__ __forceinline__ void multiply_queries(float (&scores)[STEP / 2], u64 queries, u64 keys) {
    compiler_fence(scores);
    begin_products();
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) query_key_product(scores, queries + 2 * k, keys + 2 * k, k > 0);
    commit_products();
}

// A thread's reference for the weights of its two queries. Element i of its scores and sums belongs to query i / 2 % 2.
struct Reference {
    float shift[2] = {};  // to be added to scores
    float factors[2];     // of earlier sums, if there is a new reference
    bool grown;

    // Make scores relative to the largest score so far, or to an earlier largest one as long as all relative scores are negative,
    // which their signs tell.
    __device__ __forceinline__ void subtract(float (&scores)[STEP / 2], bool first) {
        u32 signs[2] = {0xFFFFFFFF, 0xFFFFFFFF};
#pragma unroll
        for (int i = 0; i < STEP / 2; i++) {
            scores[i] += shift[i / 2 % 2];
            signs[i / 2 % 2] &= __float_as_uint(scores[i]);
        }
        grown = __any_sync(0xFFFFFFFF, int(signs[0] & signs[1]) >= 0) || first;
        if (!grown) return;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float largest = scores[row * 2];
#pragma unroll
            for (int i = 1; i < STEP / 4; i++) largest = fmaxf(largest, scores[i / 2 * 4 + row * 2 + i % 2]);
            float growth = maximum_of_four_threads(largest) + MARGIN;
            if (!first) growth = fmaxf(growth, 0);
            factors[row] = first ? 0 : power_of_two(-growth);  // the first time there are no sums, and it might be infinite
            shift[row] -= growth;
#pragma unroll
            for (int i = 0; i < STEP / 4; i++) scores[i / 2 * 4 + row * 2 + i % 2] -= growth;
        }
    }

    // Rescale sums of values whose weights were relative to an earlier reference.
    __device__ __forceinline__ void rescale(float (&sums)[COLUMNS / 2]) {
        if (grown)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) sums[i] *= factors[i / 2 % 2];
    }
};

// Replace scores by powers of two, those of PART keys from number `part` * PART on.
__device__ __forceinline__ void exponentiate(float (&scores)[STEP / 2], int part) {
#pragma unroll
    for (int i = 0; i < PART / 2; i++) scores[part * (PART / 2) + i] = power_of_two(scores[part * (PART / 2) + i]);
}

// Round the weights of PART keys from number `part` * PART on.
__device__ __forceinline__ void pack_weights(u32 (&weights)[STEP / 4], const float (&scores)[STEP / 2], int part) {
#pragma unroll
    for (int i = 0; i < PART / 4; i++) {
        int at = part * (PART / 4) + i;
        weights[at] = pack(scores[2 * at], scores[2 * at + 1]);
    }
}

// Return whether a condition is true in any of the thread block's first `threads` threads, after all of them have arrived.
__device__ __forceinline__ bool in_any_thread(int threads, bool condition) {
    u32 found;
    asm volatile(
        "{.reg .pred own, any;\n"
        "setp.ne.b32 own, %2, 0;\n"
        "barrier.cta.red.or.pred any, 1, %1, own;\n"
        "selp.b32 %0, 1, 0, any;}" : "=r"(found) : "r"(threads), "r"((u32)condition) : "memory");
    return __any_sync(0xFFFFFFFF, found);  // one value per warp, as the compiler sees then
}

// Transpose the words of four threads that share a row, so that each has 16 bytes side by side: word i of a thread becomes word
// `lane % 4` of thread i.
__device__ __forceinline__ uint4 transpose(u32 (&words)[4], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance++) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            int low = pair * (3 - distance), high = low + distance;  // 0 and 1, 2 and 3; then 0 and 2, 1 and 3
            u32 other = __shfl_xor_sync(0xFFFFFFFF, lane & distance ? words[low] : words[high], distance);
            if (lane & distance) words[low] = other;
            else words[high] = other;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(WARPGROUP * WARPGROUPS, 4 - WARPGROUPS) NAME(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap block_map, uint4* output) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *(Shared*)memory;
    int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);  // one value per warp, as the compiler sees then
    int thread = threadIdx.x % WARPGROUP, lane = thread % 32;
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
        for (int block = 0; block < min(STAGES, BLOCKS); block++) group.load_block(shared, &block_map, block, block);
    }
    for (int i = threadIdx.x; i < 16 * DIM / 2; i += WARPGROUP * WARPGROUPS) shared.ones[i] = pack(1, 1);
    show_to_products();
    __syncthreads();
    if (warpgroup >= warpgroups) return;

    // A thread has two of 64 queries, `lane / 4` and `lane / 4 + 8` of its warp's 16, and two of every eight columns of them.
    float sums[COLUMNS / 2];
    u32 weights[STEP / 4];
    u64 queries = matrix(shared.queries + warpgroup * 64 * DIM * 2);
    wait(&shared.queries_loaded, 0);

    int stage = 0, phase = 0;  // of the block's keys and values
    auto load_ahead = [&](int block) {
        int next = block - LAG + STAGES;
        if (threadIdx.x == 0 && block >= LAG && next < BLOCKS) {
            int to = stage >= LAG ? stage - LAG : stage - LAG + STAGES;
            wait(&shared.used[to], stage >= LAG ? phase : phase ^ 1);
            group.load_block(shared, &block_map, next, to);
        }
        __syncwarp();
    };
    auto release = [&](int stage) {
        if (lane == 0) arrive(&shared.used[stage]);
    };
    // Start multiplying weights by the values of PART keys from number `step` * STEP + `part` * PART on.
    auto multiply_values = [&](int step, int part) {
        const char* block = shared.values[stage];
        u64 values = matrix(block), ones = (address(shared.ones) - address(block)) / 16;
        compiler_fence(sums), compiler_fence(weights);
        begin_products();
#pragma unroll
        for (int i = 0; i < PART / 16; i++) {
            int k = part * (PART / 16) + i;
            int row = step * STEP * 8 + k * 128;  // 16 keys further on are 16 rows of 128 bytes
            // The distance from the features to the further columns is in bits 16 to 29.
            weight_value_product(sums, weights[k * 4], weights[k * 4 + 1], weights[k * 4 + 2], weights[k * 4 + 3],
                                 values + row + ((ones - row) << 16));
        }
        commit_products();
    };
    auto end_products = [&]() {
        wait_for_products<0>();
        compiler_fence(sums), compiler_fence(weights);
    };
    auto advance = [&]() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    bool relative = !BFLOAT16;
    while (true) {  // one or two passes
        Reference reference;
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) sums[i] = 0;
#if AHEAD
        float scores[2][STEP / 2];
        wait(&shared.keys_loaded[stage], phase);
        multiply_queries(scores[0], queries, matrix(shared.keys[stage]));
        wait_for_products<0>();
        compiler_fence(scores[0]);
#pragma unroll 1
        for (int block = 0; block < BLOCKS; block++) {
            load_ahead(block);
            bool last = block + 1 == BLOCKS, wraps = stage + 1 == STAGES;
            int next = last ? stage : wraps ? 0 : stage + 1;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (relative) reference.subtract(scores[half], block == 0 && half == 0);
                if (half == 0) {
                    multiply_queries(scores[1], queries, matrix(shared.keys[stage]) + STEP * 8);
                } else {  // of the next block; after the last block its own keys again, and nothing uses the scores
                    wait(&shared.keys_loaded[next], wraps && !last ? phase ^ 1 : phase);
                    multiply_queries(scores[0], queries, matrix(shared.keys[next]));
                }
                exponentiate(scores[half], 0);
                if (half == 0) wait(&shared.values_loaded[stage], phase);
                end_products();
                compiler_fence(scores[1 - half]);
                if (half == 0 && block > 0) release(stage == 0 ? STAGES - 1 : stage - 1);
                pack_weights(weights, scores[half], 0);
                if (relative) reference.rescale(sums);
                multiply_values(half, 0);
            }
            advance();
        }
        end_products();
        release(stage == 0 ? STAGES - 1 : stage - 1);
#else
        float scores[STEP / 2];
#pragma unroll 1
        for (int block = 0; block < BLOCKS; block++) {
            load_ahead(block);
            wait(&shared.keys_loaded[stage], phase);
            multiply_queries(scores, queries, matrix(shared.keys[stage]));
            wait_for_products<0>();
            compiler_fence(scores);
            if (relative) {
                reference.subtract(scores, block == 0);
                reference.rescale(sums);
            }
            wait(&shared.values_loaded[stage], phase);
#pragma unroll
            for (int part = 0; part < KEYS / PART; part++) {
                exponentiate(scores, part);
                pack_weights(weights, scores, part);
                multiply_values(0, part);
            }
            end_products();
            release(stage);
            advance();
        }
#endif
        if (relative) break;
        float least = fminf(sums[DIM / 2], sums[DIM / 2 + 2]), largest = fmaxf(sums[DIM / 2], sums[DIM / 2 + 2]);
        if (!in_any_thread(warpgroups * WARPGROUP, !(least > LEAST_SUM && largest < LARGEST_SUM))) break;
        relative = true;  // all warpgroups have released all blocks
        for (int block = 0; threadIdx.x == 0 && block < min(STAGES, BLOCKS); block++)
            group.load_block(shared, &block_map, block, (stage + block) % STAGES);
        __syncwarp();
    }

#pragma unroll
    for (int row = 0; row < 2; row++) {
        float factor = 1 / sums[DIM / 2 + row * 2];
        int query = first + warpgroup * 64 + thread / 32 * 16 + row * 8 + lane / 4;
        auto row_of = [&](int offset) {
            u64 token = (u64)group.segment * (GROUP * DILATION) + query * DILATION + offset;
            return output + (token * HEADS + group.head) * (DIM / 8) + lane % 4;
        };
        uint4* to = row_of(group.offset);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = (half * 4 + i) * 4 + row * 2;
                words[i] = pack(sums[at] * factor, sums[at + 1] * factor);
            }
            to[half * 4] = transpose(words, lane);
        }
        for (int other = 1; PER_HEAD && other < DILATION; other++) {
            uint4* zeros = row_of((group.offset + other) % DILATION);
            zeros[0] = zeros[4] = make_uint4(0, 0, 0, 0);
        }
    }
}
