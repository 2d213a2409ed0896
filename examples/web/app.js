// The page: opens images, collects prompts, draws masks. The model is in worker.js.

const $ = (id) => document.getElementById(id);
const canvas = $('canvas');
const context = canvas.getContext('2d');
const parameters = new URLSearchParams(location.search);

const MAX_MEGAPIXELS = 64; // a decoded image takes four bytes a pixel, several times over
const SAMPLES = ['cat', 'coffee', 'astronaut', 'rocket'];
const OBJECT = 1, BACKGROUND = 0, CORNERS = [2, 3];
const DRAG = 6; // pixels of the screen from which a click is a box

let worker, size = 1024; // longest side of the model's input
let facts = {}; // what the status line says
let modelReady = false, encoded = false;
let picture = null; // {id, name, bitmap, width, height}: the open image
let prompts = []; // {label, point: [x, y]} or {box: [x1, y1, x2, y2]}, from 0 to 1 of the image
let label = OBJECT;
let hover = null, cross = null, corner = null, drag = null; // positions from 0 to 1
let shown = null; // {canvas, token}: the drawn mask
let changedAt = 0; // the first token of a mask of these prompts: earlier ones are not saved
let token = 0, running = false, waiting = false, onFullMask = null;

// ---------------------------------------------------------------- the worker

function startWorker() {
  worker = new Worker('worker.js', { type: 'module' });
  worker.onerror = (event) => fail(`The worker stopped: ${event.message || 'worker.js cannot be loaded'}.`);
  worker.onmessage = ({ data }) => receive[data.type](data);
  worker.postMessage({ type: 'load', device: parameters.get('device'), dtype: parameters.get('dtype') });
  busy('Loading the model …');
}

const files = {};
const receive = {
  progress({ file, loaded, total }) {
    files[file] = [loaded, total];
    const [done, all] = Object.values(files).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    facts.bytes = all;
    busy(done < all ? `Loading the model: ${megabytes(done)} of ${megabytes(all)} MB` : 'Starting the model …', done / all);
  },
  ready(data) {
    size = data.size;
    modelReady = true;
    facts.loaded = `${megabytes(facts.bytes ?? 0)} MB, ready in ${seconds(data.ms)}`;
    receive.device(data);
    busy(null);
    setState('ready');
    if (picture) encode();
  },
  device({ device, dtype, threads }) {
    const wasm = `WASM, ${threads} thread${threads > 1 ? 's' : ''}`;
    facts.model = `${device === 'webgpu' ? 'WebGPU' : wasm}, ${dtype}, ${facts.loaded}`;
    status();
  },
  encoded({ id, ms }) {
    if (id !== picture?.id) return;
    encoded = true;
    facts.encoded = `encoded in ${seconds(ms)}`;
    busy(null);
    setState('encoded');
    predict();
  },
  mask(data) {
    running = false;
    if (data.id === picture?.id && (prompts.length || hover || drag)) {
      facts.mask = `mask in ${Math.round(data.ms)} ms, predicted IoU ${data.score.toFixed(2)}`;
      shown = { canvas: colour(data), token: data.token };
      setState('mask');
      draw();
    }
    if (waiting) predict();
  },
  'full-mask'(data) {
    onFullMask?.(data);
    onFullMask = null;
  },
  error({ during, message }) {
    running = false;
    busy(null);
    fail(during === 'encode' ? `The image cannot be encoded: ${message}` : message);
  },
};

// ---------------------------------------------------------------- images

async function open(file, name = file.name) {
  say(null);
  const address = URL.createObjectURL(file);
  try {
    // The size is known before anything is decoded.
    const { naturalWidth: width, naturalHeight: height } = await sizeOf(address, name);
    const megapixels = (width * height) / 1e6;
    if (megapixels > MAX_MEGAPIXELS) {
      throw new Error(`${name} has ${Math.round(megapixels)} megapixels (${width} × ${height}), and the limit is ${MAX_MEGAPIXELS}. Make it smaller.`);
    }
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new Error(`${name} is damaged and cannot be decoded. Try another copy of it.`);
    });
    picture = { id: (picture?.id ?? 0) + 1, name, bitmap, width: bitmap.width, height: bitmap.height };
  } catch (error) {
    fail(error.message);
    return;
  } finally {
    URL.revokeObjectURL(address);
  }
  [prompts, hover, cross, corner, shown, encoded] = [[], null, null, null, null, false];
  facts.encoded = facts.mask = null;
  [canvas.hidden, $('welcome').hidden] = [false, true];
  const [width, height] = fitted(Math.min(Math.max(picture.width, picture.height, 1040), 1600));
  [canvas.width, canvas.height] = [width, height];
  draw();
  if (modelReady) encode();
}

function sizeOf(address, name) {
  return new Promise((resolve, reject) => {
    const element = new Image();
    element.onload = () => resolve(element);
    element.onerror = () => reject(new Error(`${name} is not an image that this browser can open. Use a JPEG, PNG or WebP.`));
    element.src = address;
  });
}

// (width, height) of the image with `side` pixels on its longest side.
function fitted(side) {
  const scale = side / Math.max(picture.width, picture.height);
  return [picture.width, picture.height].map((length) => Math.max(1, Math.floor(length * scale + 0.5)));
}

async function encode() {
  setState('encoding');
  busy('Encoding the image, once …');
  const [width, height] = fitted(size);
  const { id } = picture;
  const resized = await createImageBitmap(picture.bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: 'high' });
  if (id !== picture.id) return;
  const scratch = new OffscreenCanvas(width, height).getContext('2d');
  scratch.fillStyle = '#fff'; // transparency is white, as in Python
  scratch.fillRect(0, 0, width, height);
  scratch.drawImage(resized, 0, 0);
  const { buffer } = scratch.getImageData(0, 0, width, height).data;
  worker.postMessage({ type: 'encode', id, width, height, rgba: buffer }, [buffer]);
}

// ---------------------------------------------------------------- prompts

function predict() {
  if (!encoded) return;
  if (running) { waiting = true; return; }
  waiting = false;
  const all = [...prompts];
  if (drag?.box) replaceBox(all, drag.box);
  else if (hover) all.push({ label, point: hover });
  if (!all.some((prompt) => prompt.box || prompt.label === OBJECT)) { // background alone selects nothing
    shown = null;
    draw();
    return;
  }
  const points = [], labels = [];
  for (const { box, point, label } of all) {
    if (box) { points.push(box.slice(0, 2), box.slice(2)); labels.push(...CORNERS); }
    else { points.push(point); labels.push(label); }
  }
  running = true;
  worker.postMessage({ type: 'prompt', id: picture.id, token: ++token, points, labels });
}

function replaceBox(list, box) { // one object has one box
  const at = list.findIndex((prompt) => prompt.box);
  if (at >= 0) list.splice(at, 1);
  list.push({ box });
}

function addPoint(point, which = label) {
  prompts = [...prompts, { label: which, point }];
  changed();
}

function addBox(box) {
  prompts = [...prompts];
  replaceBox(prompts, box);
  changed();
}

function changed() {
  hover = null;
  if (!prompts.length) shown = null;
  changedAt = token + 1;
  facts.mask = null;
  draw();
  predict();
}

const canSave = () => prompts.length > 0 && shown !== null && shown.token >= changedAt;

const undo = () => { prompts = prompts.slice(0, -1); changed(); };
const clear = () => { [prompts, corner] = [[], null]; changed(); };

function choose(which) {
  label = which;
  $('object').setAttribute('aria-pressed', which === OBJECT);
  $('background').setAttribute('aria-pressed', which === BACKGROUND);
}

// ---------------------------------------------------------------- drawing

function colour({ mask, width, height }) {
  const layer = new OffscreenCanvas(width, height);
  const pixels = new ImageData(width, height);
  const values = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < mask.length; ++i) {
    if (!mask[i]) continue;
    const x = i % width;
    const inside = x > 0 && x < width - 1 && mask[i - 1] && mask[i + 1] && mask[i - width] && mask[i + width];
    values[i] = inside ? 0x80ff7c4f : 0xffffffff; // ABGR: blue within a white edge
  }
  layer.getContext('2d').putImageData(pixels, 0, 0);
  return layer;
}

function draw() {
  if (!picture) return;
  const { width, height } = canvas;
  const unit = width / (canvas.clientWidth || width);
  context.clearRect(0, 0, width, height);
  context.drawImage(picture.bitmap, 0, 0, width, height);
  if (shown) context.drawImage(shown.canvas, 0, 0, width, height);
  for (const { box, point, label } of prompts) {
    if (box) rectangle(box, unit);
    else dot(point, label === OBJECT ? '#16a34a' : '#e11d48', unit);
  }
  if (drag?.box) rectangle(drag.box, unit);
  if (cross) {
    const [x, y] = [cross[0] * width, cross[1] * height];
    if (corner) rectangle([...corner, ...cross], unit);
    for (const [colour, thickness] of [['#000', 4], ['#fff', 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness * unit;
      context.beginPath();
      context.moveTo(x - 11 * unit, y); context.lineTo(x + 11 * unit, y);
      context.moveTo(x, y - 11 * unit); context.lineTo(x, y + 11 * unit);
      context.stroke();
    }
  }
  for (const id of ['undo', 'clear']) $(id).disabled = !prompts.length;
  for (const id of ['save-cutout', 'save-mask']) $(id).disabled = !canSave();
  status();
}

function dot([x, y], fill, unit) {
  context.beginPath();
  context.arc(x * canvas.width, y * canvas.height, 6 * unit, 0, 7);
  context.fillStyle = fill;
  context.fill();
  context.lineWidth = 2 * unit;
  context.strokeStyle = '#fff';
  context.stroke();
}

function rectangle([x1, y1, x2, y2], unit) {
  context.lineWidth = 2 * unit;
  context.strokeStyle = '#ffd34f';
  context.strokeRect(x1 * canvas.width, y1 * canvas.height, (x2 - x1) * canvas.width, (y2 - y1) * canvas.height);
}

// ---------------------------------------------------------------- downloads

function save(kind) {
  if (!canSave()) return;
  const { id, name, bitmap, width, height } = picture;
  onFullMask = async ({ mask }) => {
    const output = new OffscreenCanvas(width, height);
    const target = output.getContext('2d');
    if (kind === 'cutout') target.drawImage(bitmap, 0, 0);
    const pixels = kind === 'cutout' ? target.getImageData(0, 0, width, height) : new ImageData(width, height);
    for (let i = 0; i < mask.length; ++i) {
      if (kind === 'cutout') pixels.data[4 * i + 3] *= mask[i];
      else pixels.data.set([255 * mask[i], 255 * mask[i], 255 * mask[i], 255], 4 * i);
    }
    target.putImageData(pixels, 0, 0);
    const link = document.createElement('a');
    link.href = URL.createObjectURL(await output.convertToBlob({ type: 'image/png' }));
    link.download = `${name.replace(/\.[^.]*$/, '')}_${kind}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  worker.postMessage({ type: 'mask', id, width, height });
}

// ---------------------------------------------------------------- words

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

function setState(state) {
  document.body.dataset.state = state;
  status();
}

function status() {
  const image = picture && `${picture.name}, ${picture.width} × ${picture.height}`;
  $('status').textContent = [facts.model, image, facts.encoded, facts.mask].filter(Boolean).join('  ·  ') || 'Loading the model …';
}

function busy(text, share) {
  $('busy').hidden = !text;
  $('busy-text').textContent = text ?? '';
  if (share === undefined) $('bar').removeAttribute('value');
  else $('bar').value = share;
}

function say(text) {
  $('message').hidden = !text;
  $('message').textContent = text ?? '';
}

function fail(text) {
  say(text);
  if (!modelReady) { busy(null); setState('failed'); $('status').textContent = 'No model.'; }
}

// ---------------------------------------------------------------- mouse, keys, files

function position(event) {
  const box = canvas.getBoundingClientRect();
  const within = (value) => Math.min(Math.max(value, 0), 1);
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
}

canvas.addEventListener('pointerdown', (event) => {
  if (!encoded) return;
  canvas.setPointerCapture(event.pointerId);
  cross = null;
  drag = { start: position(event), x: event.clientX, y: event.clientY, box: null, button: event.button };
});

canvas.addEventListener('pointermove', (event) => {
  if (!encoded) return;
  const here = position(event);
  if (drag) {
    if (drag.button === 0 && (drag.box || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) >= DRAG)) {
      const [x, y] = drag.start;
      drag.box = [Math.min(x, here[0]), Math.min(y, here[1]), Math.max(x, here[0]), Math.max(y, here[1])];
    }
  } else if (event.pointerType === 'mouse') {
    hover = prompts.length ? null : here; // later masks stand still until the next click
  }
  draw();
  if (drag?.box || hover) predict();
});

canvas.addEventListener('pointerup', (event) => {
  if (!drag) return;
  const { start, box, button } = drag;
  drag = null;
  if (box) addBox(box);
  else addPoint(start, button === 2 || event.shiftKey ? BACKGROUND : label);
});

canvas.addEventListener('pointercancel', () => { drag = null; draw(); });
canvas.addEventListener('pointerleave', () => {
  hover = null;
  if (!prompts.length && !drag) { shown = null; facts.mask = null; draw(); }
});
canvas.addEventListener('contextmenu', (event) => event.preventDefault());

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

document.addEventListener('keydown', (event) => {
  if (event.altKey || (event.ctrlKey || event.metaKey) && event.key.toLowerCase() !== 'z') return;
  const onCanvas = document.activeElement === canvas;
  if (onCanvas && STEPS[event.key] && encoded) {
    event.preventDefault();
    cross ??= [0.5, 0.5];
    const step = (event.shiftKey ? 0.05 : 0.01);
    cross = cross.map((value, i) => Math.min(Math.max(value + step * STEPS[event.key][i], 0), 1));
    hover = prompts.length || corner ? null : cross;
    draw();
    if (hover) predict();
  } else if (onCanvas && encoded && (event.key === 'Enter' || event.key === ' ')) {
    event.preventDefault();
    addPoint(cross ??= [0.5, 0.5]);
  } else if (onCanvas && encoded && event.key.toLowerCase() === 'x') {
    cross ??= [0.5, 0.5];
    if (!corner) { corner = cross; draw(); return; }
    const [[x1, y1], [x2, y2]] = [corner, cross];
    corner = null;
    if (x1 !== x2 && y1 !== y2) addBox([Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)]);
  } else {
    const action = { o: () => choose(OBJECT), b: () => choose(BACKGROUND), z: undo, escape: clear, s: () => save('cutout'), m: () => save('mask') }[event.key.toLowerCase()];
    action?.();
  }
});

$('object').onclick = () => choose(OBJECT);
$('background').onclick = () => choose(BACKGROUND);
$('undo').onclick = undo;
$('clear').onclick = clear;
$('save-cutout').onclick = () => save('cutout');
$('save-mask').onclick = () => save('mask');
$('file').onchange = ({ target }) => { if (target.files[0]) open(target.files[0]); target.value = ''; };

document.addEventListener('dragover', (event) => { event.preventDefault(); $('stage').classList.add('drop'); });
document.addEventListener('dragleave', () => $('stage').classList.remove('drop'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  $('stage').classList.remove('drop');
  const [file] = event.dataTransfer.files;
  if (file) open(file);
  else fail('That was no file. Drop an image file.');
});
document.addEventListener('paste', (event) => { const [file] = event.clipboardData.files; if (file) open(file); });

for (const name of SAMPLES) {
  const button = document.createElement('button');
  button.title = button.ariaLabel = `Open the photograph “${name}”`;
  const thumbnail = Object.assign(new Image(), { src: `images/${name}.jpg`, alt: '' });
  thumbnail.onerror = () => button.remove();
  button.append(thumbnail);
  button.onclick = async () => open(await (await fetch(thumbnail.src)).blob(), `${name}.jpg`);
  $('samples').append(button);
}

// The service worker first, so that it keeps the model too.
if ('serviceWorker' in navigator) {
  const installed = navigator.serviceWorker.register('sw.js').then(() => navigator.serviceWorker.ready);
  const controlled = navigator.serviceWorker.controller ? null : new Promise((resolve) => { navigator.serviceWorker.oncontrollerchange = resolve; });
  const patience = new Promise((resolve) => setTimeout(resolve, 3000));
  await Promise.race([installed.then(() => controlled), patience]).catch(() => null);
}
startWorker();
