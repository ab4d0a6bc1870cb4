// start.js - all that RUNBOOK.md needs, on this machine: rehearse the page here before you do it where it counts
//
//   load.js --> app.js --> nginx, a route --> chaos-proxy shop-a --> nginx, the dependency
//                                   (past it)------------------->
//
//   npm install && NAME=/team/stage/chaos RETRIES=1 node start.js
//   . DIR/settings            (in another terminal; PowerShell: . DIR/settings.ps1)
//
// SSM is what AWS_ENDPOINT_URL says (`moto_server -p 5000` is enough), else AWS's. CACHE, RETRIES, BREAKER: see app.js; RATE:
// load.js; PAGE: the path it asks for, page or item; CHAOS_PROXY: the program. A second proxy, shop-b, is no canary. Logs,
// settings and the nginx files are in DIR, which is DIR or a new folder. Ctrl-C stops all of it.
'use strict';
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const net = require('node:net');
const os = require('node:os');
const path = require('node:path');

const dir = fs.realpathSync(process.env.DIR || fs.mkdtempSync(path.join(os.tmpdir(), 'chaos-sample-')));
const name = process.env.NAME || '/team/stage/chaos';
const children = [];

// A program; its stdout or stderr may be a log file. Resolves with its first line, when one is expected.
function start(command, args, { log, to = 2, env = {}, line = true }) {
  const file = fs.openSync(path.join(dir, log), 'a');
  const stdio = ['ignore', line ? 'pipe' : file, file];
  const child = spawn(command, args, { stdio, env: { ...process.env, ...env } });
  children.push(child);
  child.on('error', (error) => fail(`${command}: ${error.message}`));
  child.on('exit', (code, signal) => stopping || fail(`${path.basename(command)} ended (${signal || code}): see ${path.join(dir, log)}`));
  if (!line) return child;
  return new Promise((resolve) => {
    let text = '';
    child.stdout.setEncoding('utf8').on('data', (more) => {
      text += more;
      if (text.includes('\n')) resolve([child, Number(text.split('\n')[0].split(':').pop())]);
    });
  });
}

function freePort() {
  return new Promise((resolve) => {
    const server = net.createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

function listening(port) {
  return new Promise((resolve) => {
    const look = () => {
      const socket = net.connect(port, '127.0.0.1', () => resolve(socket.destroy())).on('error', () => setTimeout(look, 20));
    };
    look();
  });
}

const running = (child) => child.exitCode === null && child.signalCode === null;

function end(child) {
  if (!running(child)) return Promise.resolve();
  child.kill('SIGTERM');
  setTimeout(() => child.kill('SIGKILL'), 5000).unref();
  return new Promise((resolve) => child.on('exit', resolve));
}

// The client first: what it waits for is still answered.
let stopping = false;
async function stop(code) {
  if (stopping) return;
  stopping = true;
  for (const group of [children.filter((child) => child.client), children]) await Promise.all(group.map(end));
  process.exit(code);
}

function fail(text) {
  if (!stopping) console.error('start.js: ' + text);
  stop(1);
}

function write(file, text) {
  fs.writeFileSync(path.join(dir, file), text);
}

async function proxy(instance, service) {
  const admin = await freePort();
  const [command, ...words] = (process.env.CHAOS_PROXY || 'chaos-proxy').split(' ');
  const [child, port] = await start(
    command,
    [...words, '--listen', '127.0.0.1:0', '--upstream', `http://127.0.0.1:${service}`, '--config', `ssm:${name}`, '--instance', instance,
      '--admin', `127.0.0.1:${admin}`],
    { log: `${instance}.log` });
  return { pid: child.pid, port, admin };
}

async function main() {
  const [service, route] = [await freePort(), await freePort()];
  const root = process.getuid && process.getuid() === 0 ? 'user root;' : '';
  const conf = fs.readFileSync(path.join(__dirname, 'nginx.conf'), 'utf8').replace(/^#.*\n/, '');
  write('nginx.conf', conf.replace('USER', root).replace(/DIR/g, dir).replace('SERVICE', service).replace('ROUTE', route));
  const [shopA] = await Promise.all([proxy('shop-a', service), proxy('shop-b', service)]);
  write('through.conf', `proxy_pass http://127.0.0.1:${shopA.port};\n`);
  write('past.conf', `proxy_pass http://127.0.0.1:${service};\n`);
  fs.copyFileSync(path.join(dir, 'through.conf'), path.join(dir, 'route.conf'));
  start('nginx', ['-p', dir, '-e', path.join(dir, 'nginx.log'), '-c', path.join(dir, 'nginx.conf')], { log: 'nginx.log', line: false });
  await Promise.all([listening(service), listening(route)]);
  const [, app] = await start(process.execPath, [path.join(__dirname, 'app.js')], { log: 'app.log', env: { DEPENDENCY: `http://127.0.0.1:${route}` } });
  const url = `http://127.0.0.1:${app}/${process.env.PAGE || 'item'}/`;
  start(process.execPath, [path.join(__dirname, 'load.js')], { log: 'client.log', line: false, env: { URL: url } }).client = true;
  const settings = {
    NAME: name, DIR: dir, PROXY_PID: shopA.pid, ADMIN: `127.0.0.1:${shopA.admin}`, SERVICE: `http://127.0.0.1:${service}`,
    LOGS: ['client', 'app', 'shop-a'].map((log) => path.join(dir, log + '.log')).join(' '),
    PROXY_LOGS: ['shop-a', 'shop-b'].map((log) => path.join(dir, log + '.log')).join(' '),
  };
  const pairs = Object.entries(settings);
  write('settings', pairs.map(([key, value]) => `export ${key}='${value}'\n`).join(''));
  write('settings.ps1', pairs.map(([key, value]) => `$${key} = '${value}'${key.endsWith('LOGS') ? " -split ' '" : ''}\n`).join(''));
  console.log(`ready: . ${path.join(dir, 'settings')}`);
}

process.on('SIGTERM', () => stop(0)).on('SIGINT', () => stop(0));
main().catch((error) => fail(error.message));
