// The model, in a worker: the page stays responsive while an image is encoded.
//
// Messages in:  {type: 'load', device, dtype}, {type: 'encode', id, width, height, rgba}, {type: 'prompt', id, token, points, labels},
//               {type: 'mask', id, width, height}
// Messages out: progress, ready, encoded, mask, full-mask, error

const here = new URL('./', self.location.href);
const MODEL = 'model';

let library, model, processor, device, dtype;
let exported, threads, wantedDtype; // dtypes of the model folder, threads of WebAssembly, and ?dtype=
let image = null; // {id, width, height, embeddings}: the encoded image
let latest = null; // {id, logits, side}: the best mask of the last prompt

self.onmessage = async ({ data }) => {
  try {
    await { load, encode, prompt, mask: fullMask }[data.type](data);
  } catch (error) {
    self.postMessage({ type: 'error', during: data.type, id: data.id, token: data.token, message: String(error?.message ?? error) });
  }
};

async function load({ device: wanted, dtype: named }) {
  const start = performance.now();
  wantedDtype = named;
  try {
    library = await import(new URL('vendor/transformers.min.js', here).href);
  } catch (error) {
    throw new Error(`transformers.js is not in vendor/. Run “make web”, which fetches it. (${error.message})`);
  }
  const { env, AutoProcessor } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = here.pathname;
  env.useBrowserCache = false; // the service worker keeps all files
  env.useWasmCache = false;
  env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL('vendor/ort-wasm-simd-threaded.asyncify.mjs', here).href,
    wasm: new URL('vendor/ort-wasm-simd-threaded.asyncify.wasm', here).href,
  };
  // Several threads need the headers of serve.py, or of another server that isolates the page.
  threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  env.backends.onnx.wasm.numThreads = threads;
  const response = await fetch(new URL(`${MODEL}/config.json`, here)).catch(() => null);
  if (!response?.ok) {
    throw new Error(`No model at ${new URL(MODEL, here).pathname}/. Run “make web”, which exports one, or: samlight export FOLDER --format onnx --out examples/web/model --dtype fp32 fp16 int8`);
  }
  exported = (await response.json()).onnx_export?.dtypes ?? ['fp32'];
  processor = await AutoProcessor.from_pretrained(MODEL);
  const adapter = wanted === 'wasm' ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  if (wanted === 'webgpu' && !adapter) throw new Error('This browser has no WebGPU here. Leave ?device=webgpu out.');
  try {
    await startOn(adapter ? 'webgpu' : 'wasm', adapter);
  } catch (error) {
    if (!adapter) throw error;
    await startOn('wasm'); // a driver that cannot load the model
  }
  self.postMessage({ type: 'ready', size: processor.image_processor.size.longest_edge, ...facts(), ms: performance.now() - start });
}

const facts = () => ({ device, dtype, threads });

async function startOn(name, adapter = null) {
  const preferred = wantedDtype ? [wantedDtype] : name === 'webgpu' ? (adapter.features.has('shader-f16') ? ['fp16', 'fp32'] : ['fp32']) : ['int8', 'fp32'];
  const encoder = preferred.find((each) => exported.includes(each)) ?? exported[0];
  const decoder = exported.includes('fp32') ? 'fp32' : encoder;
  model = await library.SamModel.from_pretrained(MODEL, {
    device: name,
    dtype: { vision_encoder: encoder, prompt_encoder_mask_decoder: decoder },
    progress_callback: (progress) => {
      if (progress.status === 'progress') self.postMessage({ type: 'progress', file: progress.file, loaded: progress.loaded, total: progress.total });
    },
  });
  [device, dtype] = [name, encoder];
}

async function encode(data) {
  image = latest = null;
  try {
    await encodeHere(data);
  } catch (error) {
    if (device !== 'webgpu') throw error;
    await startOn('wasm'); // a driver that cannot run the model
    self.postMessage({ type: 'device', ...facts() });
    await encodeHere(data);
  }
}

async function encodeHere({ id, width, height, rgba }) {
  const start = performance.now();
  const raw = new library.RawImage(new Uint8ClampedArray(rgba), width, height, 4).rgb();
  const inputs = await processor(raw);
  const [inputHeight, inputWidth] = inputs.reshaped_input_sizes[0];
  const embeddings = await model.get_image_embeddings({ pixel_values: inputs.pixel_values });
  image = { id, width: inputWidth, height: inputHeight, side: inputs.pixel_values.dims[3], embeddings };
  self.postMessage({ type: 'encoded', id, ms: performance.now() - start });
}

// points: [[x, y], ...] from 0 to 1 of the image; labels: 1 object, 0 background, 2 and 3 the corners of a box.
async function prompt({ id, token, points, labels }) {
  if (image?.id !== id) return;
  const start = performance.now();
  const { Tensor } = library;
  const coordinates = points.flatMap(([x, y]) => [x * image.width, y * image.height]);
  const { iou_scores, pred_masks } = await model({
    ...image.embeddings,
    input_points: new Tensor('float32', Float32Array.from(coordinates), [1, 1, points.length, 2]),
    input_labels: new Tensor('int64', BigInt64Array.from(labels, BigInt), [1, 1, labels.length]),
  });
  const scores = Array.from(iou_scores.data);
  const best = scores.indexOf(Math.max(...scores));
  const side = pred_masks.dims.at(-1);
  const logits = pred_masks.data.slice(best * side * side, (best + 1) * side * side);
  latest = { id, logits, side };
  const mask = upscale(logits, side, image.width, image.height);
  self.postMessage({ type: 'mask', id, token, mask, width: image.width, height: image.height, score: scores[best], ms: performance.now() - start }, [mask.buffer]);
}

// The mask of the last prompt at the size of the image file.
async function fullMask({ id, width, height }) {
  if (image?.id !== id || latest?.id !== id) throw new Error('There is no mask yet.');
  const mask = upscale(latest.logits, latest.side, width, height);
  self.postMessage({ type: 'full-mask', id, mask, width, height }, [mask.buffer]);
}

// Logits of the padded square to a mask of the image: 1 inside, bilinear.
function upscale(logits, side, width, height) {
  const mask = new Uint8Array(width * height);
  const [usedX, usedY] = [(image.width / image.side) * side, (image.height / image.side) * side];
  const columns = Array.from({ length: width }, (_, x) => {
    const at = Math.min(Math.max(((x + 0.5) * usedX) / width - 0.5, 0), side - 1);
    const left = Math.floor(at);
    return [left, Math.min(left + 1, side - 1), at - left];
  });
  for (let y = 0; y < height; ++y) {
    const at = Math.min(Math.max(((y + 0.5) * usedY) / height - 0.5, 0), side - 1);
    const top = Math.floor(at);
    const [upper, lower, down] = [top * side, Math.min(top + 1, side - 1) * side, at - top];
    for (let x = 0; x < width; ++x) {
      const [left, right, along] = columns[x];
      const above = logits[upper + left] * (1 - along) + logits[upper + right] * along;
      const below = logits[lower + left] * (1 - along) + logits[lower + right] * along;
      if (above * (1 - down) + below * down > 0) mask[y * width + x] = 1;
    }
  }
  return mask;
}
