// The stage of the page: draws what the server sends, and sends what the user does.
// `element`, `props`, `trigger` and `watch` come from gr.HTML. Events: 'act' and 'fresh'.
const WAIT_MS = 60000;  // a full queue or a lost connection sends no view: after this the user may go on
const DRAG = 5;  // pixels of the screen: less is a click
const find = (selector) => element.querySelector(selector);
const canvas = find('.sl-canvas'), context = canvas.getContext('2d');
const cache = window.samlightCache ??= { image: null, id: null, loading: null, masks: new Map() };
let view = null, tool = '1', waiting = [], busy = false, timer = null;
let pending = [], corner = null, drag = null, shown = null, said = null;

const load = (uri) => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = reject;
  image.src = uri;
});
const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

// Actions are sent one batch after the other: the server answers in the order in which they were made.
function act(action) {
  waiting.push(action);
  send();
}
function send() {
  if (busy || !waiting.length) return;
  busy = true;
  element.classList.add('sl-busy');
  timer = setTimeout(() => { say('The server does not answer. Try again.', true); settle(); }, WAIT_MS);
  trigger('act', { actions: waiting, known: [...cache.masks.keys()], image: view?.image.id });
  waiting = [];
}
function settle() {
  clearTimeout(timer);
  busy = false;
  element.classList.remove('sl-busy');
  send();
}
window.samlightFailed = () => { say('The server could not do this: it may be busy. Try again.', true); pending = []; settle(); draw(); };

function say(text, isError = false) {
  const status = find('.sl-status');
  status.textContent = text;
  status.classList.toggle('sl-error', isError);
}

// What was done on one image is not done on the next.
function forget() {
  view = shown = null;
  pending = [];
  waiting = [];
}

async function receive() {
  const next = props.value;
  if (!next) { forget(); return settle(); }
  if (next === shown) return;
  shown = next;
  if (next.image.uri && cache.id !== next.image.id) {
    Object.assign(cache, { id: next.image.id, loading: load(next.image.uri), masks: new Map() });
  }
  const image = await cache.loading;
  if (shown !== next) return;  // of two images the later one stays, whichever is loaded first
  cache.image = image;
  const kept = new Set(next.objects.map((object) => object.number));
  for (const number of cache.masks.keys()) if (!kept.has(number)) cache.masks.delete(number);
  await Promise.all([
    ...next.objects.filter((object) => object.mask).map(async (object) => cache.masks.set(object.number, await load(object.mask))),
    ...next.candidates.map(async (candidate) => { candidate.image = await load(candidate.mask); }),
  ]);
  if (next.everything) next.everything.image = await load(next.everything.picture);
  if (shown !== next) return;  // a newer one has come meanwhile
  view = next;
  if (!busy || !waiting.length) pending = [];
  for (const button of element.querySelectorAll('[data-format]')) button.disabled = !(view.candidates.length || view.objects.length);
  find('[data-do=undo]').disabled = !view.can_undo;
  find('[data-do=keep]').disabled = !view.candidates.length;
  draw();
  drawCandidates();
  drawObjects();
  report();
  if (view.download) save(view.download);
  element.dataset.views = Number(element.dataset.views || 0) + 1;
  settle();
}

function report() {
  if (view.message) return say(view.message, true);
  const parts = [`${view.image.name}, ${view.image.width}×${view.image.height}`, `encoded in ${view.encode_ms.toFixed(0)} ms`];
  if (view.candidates.length && view.decode_ms != null) parts.push(`masks in ${view.decode_ms.toFixed(0)} ms`);
  if (view.everything) parts.push(`everything: ${view.everything.count} masks in ${(view.everything.ms / 1000).toFixed(1)} s`);
  if (!view.candidates.length && !view.everything) parts.push('click on an object');
  say(parts.join(' · '));
}

function save({ name, media_type, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: media_type }));
  const link = make('a', { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// A mask is white on nothing; this gives it a colour, and an outline `edge` pixels thick.
function tint(mask, colour, alpha, edge) {
  const { width, height } = canvas;
  const paint = () => {
    const layer = make('canvas', { width, height });
    const pen = layer.getContext('2d');
    pen.imageSmoothingEnabled = true;
    return [layer, pen];
  };
  const [solid, pen] = paint();
  pen.drawImage(mask, 0, 0, width, height);
  pen.globalCompositeOperation = 'source-in';
  pen.fillStyle = colour;
  pen.fillRect(0, 0, width, height);
  const [outline, line] = paint();
  for (let turn = 0; turn < 16; turn++) {
    line.drawImage(solid, edge * Math.cos(turn * Math.PI / 8), edge * Math.sin(turn * Math.PI / 8));
  }
  line.globalCompositeOperation = 'destination-out';
  line.drawImage(solid, 0, 0);
  context.globalAlpha = alpha;
  context.drawImage(solid, 0, 0);
  context.globalAlpha = 1;
  context.drawImage(outline, 0, 0);
}

function draw() {
  if (!cache.image || !view) return;
  const scale = Math.max(1, 900 / Math.max(cache.image.width, cache.image.height));  // outlines of a small image stay fine
  canvas.width = Math.round(cache.image.width * scale);
  canvas.height = Math.round(cache.image.height * scale);
  const toX = canvas.width / view.image.width, toY = canvas.height / view.image.height;
  const unit = Math.max(1, canvas.width / Math.max(1, canvas.clientWidth));  // a pixel of the screen
  context.drawImage(cache.image, 0, 0, canvas.width, canvas.height);
  if (view.everything) context.drawImage(view.everything.image, 0, 0, canvas.width, canvas.height);
  for (const object of view.objects) {
    if (object.is_visible && cache.masks.has(object.number)) tint(cache.masks.get(object.number), object.colour, 0.4, 1.5 * unit);
  }
  const chosen = view.candidates[view.chosen];
  if (chosen) tint(chosen.image, view.colour, 0.5, 2 * unit);
  const box = drag?.box ?? pending.findLast((action) => action.type === 'box')?.box ?? view.box;
  if (box) {
    const [x1, y1, x2, y2] = box;
    for (const [width, colour] of [[4, '#000a'], [2, '#fff']]) {
      context.lineWidth = width * unit;
      context.strokeStyle = colour;
      context.strokeRect(x1 * toX, y1 * toY, (x2 - x1) * toX, (y2 - y1) * toY);
    }
  }
  const points = [...view.points, ...pending.filter((action) => action.type === 'point').map(({ x, y, label }) => [x, y, label])];
  if (corner) points.push([...corner, 2]);
  for (const [x, y, label] of points) {
    context.beginPath();
    context.arc(x * toX, y * toY, 6 * unit, 0, 7);
    context.fillStyle = ['#ef4444', '#22c55e', '#ffffff'][label];
    context.fill();
    context.lineWidth = 2 * unit;
    context.strokeStyle = label === 2 ? '#000' : '#fff';
    context.stroke();
  }
}

function drawCandidates() {
  const strip = find('.sl-candidates');
  strip.replaceChildren(...view.candidates.map((candidate, index) => {
    const width = 240, height = Math.max(1, Math.round(width * view.image.height / view.image.width));
    const small = make('canvas', { width, height });
    const pen = small.getContext('2d');
    pen.drawImage(candidate.image, 0, 0, width, height);
    pen.globalCompositeOperation = 'source-in';
    pen.drawImage(cache.image, 0, 0, width, height);
    pen.globalCompositeOperation = 'destination-over';
    pen.globalAlpha = 0.25;
    pen.drawImage(cache.image, 0, 0, width, height);
    pen.globalAlpha = 1;
    pen.fillStyle = '#111';
    pen.fillRect(0, 0, width, height);
    const card = make('button', { type: 'button', className: 'sl-card', onclick: () => act({ type: 'choose', index }) },
      small, make('span', {}, candidate.title), make('b', {}, candidate.score.toFixed(2)));
    card.setAttribute('aria-pressed', index === view.chosen);
    return card;
  }));
}

function drawObjects() {
  find('.sl-count').textContent = view.objects.length || '';
  find('.sl-hint').hidden = view.objects.length > 0;
  find('.sl-objects').replaceChildren(...view.objects.map(({ number, name, colour, is_visible, score }) => {
    const change = (changes) => act({ type: 'object', number, ...changes });
    const eye = make('button', { type: 'button', textContent: is_visible ? '◉' : '○', title: is_visible ? 'Hide' : 'Show', onclick: () => change({ is_visible: !is_visible }) });
    eye.setAttribute('aria-label', is_visible ? 'Hide' : 'Show');
    const cross = make('button', { type: 'button', textContent: '✕', title: 'Remove', onclick: () => change({ remove: true }) });
    cross.setAttribute('aria-label', 'Remove');
    return make('li', { className: is_visible ? '' : 'sl-hidden' },
      make('input', { type: 'color', value: colour, title: 'Colour', onchange: (event) => change({ colour: event.target.value }) }),
      make('input', { type: 'text', value: name, maxLength: 60, title: 'Name: its class in files', onchange: (event) => change({ name: event.target.value }) }),
      make('span', { className: 'sl-score', title: 'Predicted IoU' }, score.toFixed(2)), eye, cross);
  }));
}

function place(event) {
  const bounds = canvas.getBoundingClientRect();
  const inside = (value, length) => Math.min(Math.max(value, 0), length);
  return [
    inside((event.clientX - bounds.left) / bounds.width * view.image.width, view.image.width - 0.01),
    inside((event.clientY - bounds.top) / bounds.height * view.image.height, view.image.height - 0.01),
  ];
}
function add(action) {
  pending.push(action);
  draw();
  act(action);
}
function addBox([x1, y1], [x2, y2]) {
  corner = null;
  if (Math.abs(x1 - x2) < 1 || Math.abs(y1 - y2) < 1) { draw(); return say('The box has no area: choose two corners.', true); }
  add({ type: 'box', box: [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)] });
}

canvas.addEventListener('contextmenu', (event) => event.preventDefault());
canvas.addEventListener('pointerdown', (event) => {
  if (!view || event.button > 2 || event.button === 1) return;
  drag = { start: place(event), x: event.clientX, y: event.clientY, box: null };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener('pointermove', (event) => {
  if (!drag || tool !== 'box' || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < DRAG) return;
  drag.box = [...drag.start, ...place(event)];
  draw();
});
canvas.addEventListener('pointercancel', () => { drag = null; draw(); });
canvas.addEventListener('pointerup', (event) => {
  if (!drag) return;
  const { start, box } = drag;
  drag = null;
  if (tool === 'box' && event.button === 0) {
    if (box) addBox(box.slice(0, 2), box.slice(2));
    else if (corner) addBox(corner, start);
    else { corner = start; say('Now click the opposite corner.'); draw(); }
    return;
  }
  const label = event.button === 2 || event.shiftKey || tool === '0' ? 0 : 1;
  add({ type: 'point', x: start[0], y: start[1], label });
});

function choose(next) {
  tool = next;
  corner = null;
  canvas.classList.toggle('sl-cross', tool === 'box');
  for (const button of element.querySelectorAll('[data-tool]')) button.setAttribute('aria-pressed', button.dataset.tool === tool);
}
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.tool) choose(button.dataset.tool);
  else if (button.dataset.format) act({ type: 'download', format: button.dataset.format });
  else if (button.dataset.do === 'fresh') { forget(); cache.id = null; trigger('fresh', {}); }
  else if (button.dataset.do) { corner = null; act({ type: button.dataset.do }); }
});
element.addEventListener('keydown', (event) => {
  if (event.target.tagName === 'INPUT') return;
  if ((event.ctrlKey || event.metaKey) && event.key === 'z') { event.preventDefault(); act({ type: 'undo' }); }
  else if (event.key === 'Escape') { corner = drag = null; draw(); }
  else if (event.target === canvas && event.key === 'Enter') act({ type: 'keep' });
  else if (['1', '2', '3'].includes(event.key)) choose(['1', '0', 'box'][event.key - 1]);
});
new ResizeObserver(() => draw()).observe(find('.sl-frame'));
watch('value', receive);
receive();
