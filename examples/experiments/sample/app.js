// app.js - the service under test: pages of a shop, made of items that another service has
//
// GET /item/N   one item: one call to the dependency
// GET /page/N   five items, one after the other: five calls, so a delay in the dependency counts five times
//
// Three mechanisms, each on with 1, off without:
//   CACHE=1     items are kept for CACHE_MS (4000), and asked for once however many wait for them
//   RETRIES=1   two more attempts after a failed call
//   BREAKER=1   more than 20 % of the last 20 calls failed: for BREAKER_MS (500) the dependency is left alone, and pages
//               say {"degraded":true} instead; then one call is let through to see
//
// DEPENDENCY is its URL. On stdout "app listening on 127.0.0.1:PORT"; on stderr a JSON line for each request: when it came,
// status, milliseconds, calls to the dependency, and how many of their replies were marked X-Chaos-Injected.
'use strict';
const http = require('node:http');

let cockatiel;
try {
  cockatiel = require('cockatiel');
} catch {
  console.error('app.js: cockatiel is not installed: npm install in this folder');
  process.exit(1);
}
const { BrokenCircuitError, CountBreaker, ExponentialBackoff, circuitBreaker, handleAll, noop, retry, wrap } = cockatiel;

const on = (name) => process.env[name] === '1';
const number = (name, fallback) => Number(process.env[name] || fallback);
const ITEMS = 40;
const retries = on('RETRIES') ? retry(handleAll, { maxAttempts: 2, backoff: new ExponentialBackoff({ initialDelay: 10 }) }) : noop;
const breaker = on('BREAKER')
  ? circuitBreaker(handleAll, {
      halfOpenAfter: number('BREAKER_MS', 500),
      breaker: new CountBreaker({ threshold: 0.2, size: 20, minimumNumberOfCalls: 10 }),
    })
  : noop;
const guarded = wrap(retries, breaker);
const cache = new Map(); // item -> { value: a promise, until }

// One call. No keep-alive: a route that is moved must not find us on an old connection.
function call(path, seen) {
  seen.calls++;
  return new Promise((resolve, reject) => {
    const request = http.get(process.env.DEPENDENCY + path, { agent: false, timeout: 5000 }, (reply) => {
      let body = '';
      if (reply.headers['x-chaos-injected']) seen.injected++;
      reply.setEncoding('utf8').on('data', (text) => (body += text)).on('error', reject);
      reply.on('end', () => (reply.statusCode < 500 ? resolve(body) : reject(new Error(`status ${reply.statusCode}`))));
    });
    request.on('timeout', () => request.destroy(new Error('no reply in 5 s'))).on('error', reject);
  });
}

function item(n, seen) {
  const path = `/item/${n % ITEMS}`;
  const fetched = () => guarded.execute(() => call(path, seen));
  if (!on('CACHE')) return fetched();
  const kept = cache.get(path);
  if (kept && kept.until > Date.now()) return kept.value;
  const value = fetched();
  // Not all at once: they expire between half of the time and all of it.
  cache.set(path, { value, until: Date.now() + number('CACHE_MS', 4000) * (0.5 + Math.random() / 2) });
  value.catch(() => cache.delete(path));
  return value;
}

async function answer(path, seen) {
  const [, kind, n] = path.match(/^\/(item|page)\/(\d+)$/) || [];
  if (!kind) return [404, { error: 'no such page' }];
  try {
    const items = [];
    for (let i = 0; i < (kind === 'page' ? 5 : 1); i++) items.push(await item(Number(n) * 5 + i, seen));
    return [200, { items }];
  } catch (error) {
    if (error instanceof BrokenCircuitError) return [200, { degraded: true }];
    return [502, { error: String(error.message) }];
  }
}

const server = http.createServer(async (request, response) => {
  const began = Date.now();
  const seen = { calls: 0, injected: 0 };
  const [status, body] = await answer(request.url, seen);
  const text = JSON.stringify(body) + '\n';
  response.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }).end(text);
  process.stderr.write(JSON.stringify({ source: 'app', time: new Date(began).toISOString(), status, ms: Date.now() - began, ...seen }) + '\n');
});
server.keepAliveTimeout = 60000;
server.listen(number('PORT', 0), '127.0.0.1', () => console.log(`app listening on 127.0.0.1:${server.address().port}`));
process.on('SIGTERM', () => process.exit(0));
