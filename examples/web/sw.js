// Keep every file of the page, the library and the model, so that the page opens again without a network.
const CACHE = 'samlight-1';

const PAGE = ['./', 'style.css', 'app.js', 'worker.js']; // loaded before this worker runs

self.addEventListener('install', (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(PAGE)));
});
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));

self.addEventListener('fetch', (event) => {
  const { request } = event;
  if (request.method !== 'GET' || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith(fromNetworkOrCache(request));
});

async function fromNetworkOrCache(request) {
  const cache = await caches.open(CACHE);
  const kept = { ignoreSearch: request.mode === 'navigate' };
  try {
    const response = await fetch(request);
    // Where the browser has no room for the model, the page goes on to work with a network.
    if (response.status === 200) await cache.put(request, response.clone()).catch(() => null);
    return response;
  } catch (error) {
    const response = await cache.match(request, kept);
    if (response) return response;
    throw error;
  }
}
