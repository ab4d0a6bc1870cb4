// load.js - the client: RATE requests a second (50) to URL followed by a number, whatever the answers take
//
// The pace does not wait for answers (an open loop), and the time of a request counts from when it was due: a service that
// gets slow cannot hide it. On stdout a JSON line for each: when it was due, status (0 = no answer), milliseconds. SIGTERM
// ends it when the last answer is there.
'use strict';
const http = require('node:http');
const agent = new http.Agent({ keepAlive: true });
const every = 1000 / Number(process.env.RATE || 50);
const began = Date.now();
let sent = 0, waiting = 0, stopping = false;

function ask(n, due) {
  const done = (status) => {
    const ms = Math.round((Date.now() - due) * 10) / 10;
    process.stdout.write(JSON.stringify({ source: 'client', time: new Date(due).toISOString(), status, ms }) + '\n');
    if (--waiting === 0 && stopping) process.exit(0);
  };
  waiting++;
  http.get(process.env.URL + n, { agent }, (reply) => reply.resume().on('end', () => done(reply.statusCode)).on('error', () => done(0)))
    .on('error', () => done(0));
}

const timer = setInterval(() => {
  for (; began + sent * every <= Date.now(); sent++) ask(sent, began + sent * every);
}, 5);
process.on('SIGTERM', () => {
  stopping = true;
  clearInterval(timer);
  if (waiting === 0) process.exit(0);
});
