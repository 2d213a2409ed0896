// The end of SAM's mask decoder on the tensor cores of Hopper GPUs (sm_90a): the kernel of head.py, which defines the names in capitals,
// first_product and second_product. It computes the same as `_kernel` of mask_head.py.
//
// A thread block is persistent and keeps all weights in shared memory. Each of its warpgroups takes 64 image tokens of a prompt at a
// time and makes their 4 parts, of 4 pixels each, one after another: while it computes GELUs and masks of one part, the tensor cores
// multiply for the next part, and for the other warpgroup.

#include "common.cuh"

constexpr int CHANNELS = 256, QUARTER = CHANNELS / 4, EIGHTH = CHANNELS / 8, TOKENS = 64, WARPGROUPS = 2;
constexpr int BLOCKS = CHANNELS / 64;  // of 64 channels, which are 128 bytes
constexpr u32 TOKEN_BYTES = TOKENS * 64 * 2, WEIGHT1_BYTES = CHANNELS * 64 * 2, WEIGHT2_BYTES = 4 * EIGHTH * QUARTER * 2;

struct Shared {
    char weight1[BLOCKS][WEIGHT1_BYTES], weight2[WEIGHT2_BYTES], tokens[WARPGROUPS][BLOCKS][TOKEN_BYTES];
    float2 bias1[4][QUARTER / 2], scale[QUARTER / 2], shift[QUARTER / 2], bias2[4 * EIGHTH / 2];
    u64 weights_loaded, tokens_loaded[WARPGROUPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES);

// ---- the layers of one part -------------------------------------------------------------------------------------------------------

// A thread has two of a warpgroup's 64 tokens, `lane / 4` and `lane / 4 + 8` of its warp's 16, and of every eight columns two, from
// 2 * (lane % 4) on. They are at [columns / 8 * 4 + token * 2 + column % 2] of the sums.

// Start the sums of a layer from its bias.
template <int count>
__device__ __forceinline__ void begin(float (&sums)[count], const float2* bias) {
#pragma unroll
    for (int q = 0; q < count / 4; q++) {
        float2 both = bias[q * 4 + threadIdx.x % 4];
        sums[q * 4] = sums[q * 4 + 2] = both.x, sums[q * 4 + 1] = sums[q * 4 + 3] = both.y;
    }
    compiler_fence(sums);
}

__device__ __forceinline__ void multiply_tokens(Shared& shared, float (&sums)[QUARTER / 2], int warpgroup, int part) {
    begin(sums, shared.bias1[part]);
    begin_products();
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        u64 tokens = matrix(shared.tokens[warpgroup][block]), weight = matrix(shared.weight1[block] + part * QUARTER * 128);
#pragma unroll
        for (int k = 0; k < 4; k++) first_product(sums, tokens + 2 * k, weight + 2 * k);  // 16 channels further on are 32 bytes
    }
    commit_products();
}

__device__ __forceinline__ void multiply_hidden(Shared& shared, float (&sums)[4 * EIGHTH / 2], u32 (&hidden)[QUARTER / 4]) {
    begin(sums, shared.bias2);
    compiler_fence(hidden);
    begin_products();
#pragma unroll
    for (int k = 0; k < QUARTER / 16; k++)
        second_product(sums, hidden[4 * k], hidden[4 * k + 1], hidden[4 * k + 2], hidden[4 * k + 3], matrix(shared.weight2) + 2 * k);
    commit_products();
}

// LayerNorm over each token's columns, GELU, and rounding to the layout of the next product's first matrix.
__device__ __forceinline__ void normalize(Shared& shared, u32 (&hidden)[QUARTER / 4], float (&sums)[QUARTER / 2], float eps) {
#pragma unroll
    for (int token = 0; token < 2; token++) {
        float mean = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < QUARTER / 4; i++) mean += sums[i / 2 * 4 + token * 2 + i % 2];
        mean = sum_of_four_threads(mean) / QUARTER;
#pragma unroll
        for (int i = 0; i < QUARTER / 4; i++) {
            float& value = sums[i / 2 * 4 + token * 2 + i % 2];
            value -= mean, squares = fmaf(value, value, squares);
        }
        float factor = rsqrtf(sum_of_four_threads(squares) / QUARTER + eps);
#pragma unroll
        for (int q = 0; q < QUARTER / 8; q++) {
            float2 scale = shared.scale[q * 4 + threadIdx.x % 4], shift = shared.shift[q * 4 + threadIdx.x % 4];  // half of each
            float low = fmaf(sums[q * 4 + token * 2] * factor, scale.x, shift.x);
            float high = fmaf(sums[q * 4 + token * 2 + 1] * factor, scale.y, shift.y);
            fitted_gelu(low, high);
            hidden[q * 2 + token] = pack(low, high);
        }
    }
}

// Products of a thread's features with the hypernetworks' outputs: for each mask, token, part (of two beside each other) and pixel.
typedef float Partial[MASKS][2][2][4];

template <int side>
__device__ __forceinline__ void add_features(Partial& partial, const float (&sums)[4 * EIGHTH / 2], const float2 (&factors)[MASKS][EIGHTH / 8]) {
#pragma unroll
    for (int token = 0; token < 2; token++)
#pragma unroll
        for (int q = 0; q < 4 * EIGHTH / 8; q++) {
            float low = sums[q * 4 + token * 2], high = sums[q * 4 + token * 2 + 1];
            // The constants of `fitted_gelu` for the whole x: 25, -3.522957060e-04, 3.701044177e-02, 7.975026134e-01
            float2 tanh = fitted_tanh<0x4E404E40, 0x8DC68DC6, 0x28BD28BD, 0x3A613A61>(low, high);
            low = fmaf(low, tanh.x, low), high = fmaf(high, tanh.y, high);  // twice GELU; the factors are halves
#pragma unroll
            for (int mask = 0; mask < MASKS; mask++) {
                float& sum = partial[mask][token][side][q / 4];
                if (q % 4 == 0) sum = 0;
                sum = fmaf(high, factors[mask][q % 4].y, fmaf(low, factors[mask][q % 4].x, sum));
            }
        }
}

// Add the four threads of a token, of which each writes two neighbouring pixels of a mask: `lane % 2` is their part, `lane / 2 % 2` their
// row in it.
__device__ __forceinline__ void write_masks(const Partial& partial, float2* const (&masks)[MASKS], int offset, const int (&corners)[2]) {
    bool right = threadIdx.x & 1, lower = threadIdx.x & 2;
#pragma unroll
    for (int mask = 0; mask < MASKS; mask++)
#pragma unroll
        for (int token = 0; token < 2; token++) {
            float own[4], found[2];
#pragma unroll
            for (int pixel = 0; pixel < 4; pixel++) {
                float left = partial[mask][token][0][pixel], other = partial[mask][token][1][pixel];
                own[pixel] = (right ? other : left) + __shfl_xor_sync(0xFFFFFFFF, right ? left : other, 1);
            }
#pragma unroll
            for (int e = 0; e < 2; e++)
                found[e] = (lower ? own[2 + e] : own[e]) + __shfl_xor_sync(0xFFFFFFFF, lower ? own[e] : own[2 + e], 2);
            if (masks[mask]) masks[mask][corners[token] + offset] = make_float2(found[0], found[1]);
        }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------------

// The first tile from `tile` on, `step` apart, whose prompt has a selected mask.
__device__ __forceinline__ int next_tile(const int* slots, int tile, int step, int num_tiles, int tiles_per_prompt) {
    for (; tile < num_tiles; tile += step) {
        int largest = -1;
#pragma unroll
        for (int mask = 0; mask < MASKS; mask++) largest = max(largest, slots[tile / tiles_per_prompt * MASKS + mask]);
        if (largest >= 0) break;
    }
    return tile;
}

extern "C" __global__ void __launch_bounds__(WARPGROUP * WARPGROUPS, 1) NAME(
    const __grid_constant__ TensorMap token_map, const __grid_constant__ TensorMap weight1_map, const __grid_constant__ TensorMap weight2_map,
    const u32* bias1, const u32* norm_weight, const u32* norm_bias, const u32* bias2, const float2* hyper, const int* slots, float2* logits,
    int num_tiles, int tiles_per_prompt, int grid_width, float eps) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *(Shared*)memory;
    // The shuffle tells the compiler that the warp agrees: what follows from it is then in uniform registers, as products need it.
    int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0), thread = threadIdx.x % WARPGROUP, lane = thread % 32;
    if (threadIdx.x == 0) {
        prefetch(&token_map), prefetch(&weight1_map), prefetch(&weight2_map);
        make_barrier(&shared.weights_loaded, 1);
        for (int i = 0; i < WARPGROUPS; i++) make_barrier(&shared.tokens_loaded[i], 1);
        show_barriers();
        arrive_and_expect(&shared.weights_loaded, BLOCKS * WEIGHT1_BYTES + WEIGHT2_BYTES);
        for (int block = 0; block < BLOCKS; block++)
            load(&weight1_map, shared.weight1[block], &shared.weights_loaded, block * 64, 0, 0, 0, 0);
        load(&weight2_map, shared.weight2, &shared.weights_loaded, 0, 0, 0, 0, 0);
    }
    for (int i = threadIdx.x; i < CHANNELS / 2; i += blockDim.x) {
        shared.bias1[i / (QUARTER / 2)][i % (QUARTER / 2)] = unpack(bias1[i]);
        if (i < 4 * EIGHTH / 2) shared.bias2[i] = unpack(bias2[i]);
        if (i >= QUARTER / 2) continue;
        float2 scale = unpack(norm_weight[i]), shift = unpack(norm_bias[i]);
        shared.scale[i] = make_float2(scale.x / 2, scale.y / 2), shared.shift[i] = make_float2(shift.x / 2, shift.y / 2);
    }
    __syncthreads();
    wait_for_the_last_kernel();
    let_the_next_kernel_begin();

    int step = gridDim.x * WARPGROUPS;
    auto load_tokens = [&](int tile) {
        if (thread || tile >= num_tiles) return;
        arrive_and_expect(&shared.tokens_loaded[warpgroup], BLOCKS * TOKEN_BYTES);
        for (int block = 0; block < BLOCKS; block++)
            load(&token_map, shared.tokens[warpgroup][block], &shared.tokens_loaded[warpgroup], block * 64, tile * TOKENS, 0, 0, 0);
    };
    // With few tiles each is on a multiprocessor of its own.
    int tile = next_tile(slots, blockIdx.x + warpgroup * gridDim.x, step, num_tiles, tiles_per_prompt);
    load_tokens(tile);
    wait(&shared.weights_loaded, 0);
    for (int number = 0; tile < num_tiles; number++) {
        int prompt = tile / tiles_per_prompt, corners[2];
        float2 factors[MASKS][EIGHTH / 8];
        float2* masks[MASKS];
#pragma unroll
        for (int mask = 0; mask < MASKS; mask++) {
            int slot = slots[prompt * MASKS + mask];
            masks[mask] = slot < 0 ? nullptr : logits + (u64)slot * (tiles_per_prompt * TOKENS * 8);
#pragma unroll
            for (int q = 0; q < EIGHTH / 8; q++) {
                float2 both = hyper[(prompt * MASKS + mask) * (EIGHTH / 2) + q * 4 + lane % 4];
                factors[mask][q] = make_float2(both.x / 2, both.y / 2);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {  // the pair of pixels that this thread writes for each token, in the first two parts
            int token = tile % tiles_per_prompt * TOKENS + thread / 32 * 16 + i * 8 + lane / 4;
            corners[i] = (token / grid_width * 4 + lane / 2 % 2) * 2 * grid_width + token % grid_width * 2 + lane % 2;
        }
        float sums[QUARTER / 2], features[4 * EIGHTH / 2];
        u32 hidden[QUARTER / 4];
        Partial partial;
        wait(&shared.tokens_loaded[warpgroup], number);
        multiply_tokens(shared, sums, warpgroup, 0);
        int following = next_tile(slots, tile + step, step, num_tiles, tiles_per_prompt);
#pragma unroll 1
        for (int row = 0; row < 2; row++) {  // of parts
            wait_for_products<0>();
            compiler_fence(sums);
            normalize(shared, hidden, sums, eps);
            multiply_hidden(shared, features, hidden);
            multiply_tokens(shared, sums, warpgroup, row * 2 + 1);
            wait_for_products<1>();
            compiler_fence(features);
            add_features<0>(partial, features, factors);
            wait(&shared.weights_loaded, 0);  // or the compiler would move the next wait to before the features
            wait_for_products<0>();
            compiler_fence(sums);
            if (row == 1) {  // the last product with these tokens is complete
                synchronize_warpgroup(warpgroup);
                load_tokens(following);
            }
            normalize(shared, hidden, sums, eps);
            multiply_hidden(shared, features, hidden);
            if (row == 0) {
                multiply_tokens(shared, sums, warpgroup, 2);
                wait_for_products<1>();
                compiler_fence(features);
                add_features<1>(partial, features, factors);
            } else {
                wait_for_products<0>();
                compiler_fence(features);
                add_features<1>(partial, features, factors);
            }
            write_masks(partial, masks, row * 4 * grid_width, corners);
        }
        tile = following;
    }
}
