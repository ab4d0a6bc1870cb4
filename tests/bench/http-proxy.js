// The npm package http-proxy as its README sets it up, with connections to the upstream kept: http-proxy.js MODULE PORT
'use strict';
const http = require('http');
const proxy = require(process.argv[2]).createProxyServer({
  target: 'http://127.0.0.1:' + process.argv[3],
  agent: new http.Agent({ keepAlive: true }),
  xfwd: true,
});
proxy.on('error', (error, request, reply) => {
  if (reply.writeHead && !reply.headersSent) reply.writeHead(502);
  reply.end();
});
const server = http.createServer((request, reply) => proxy.web(request, reply));
server.keepAliveTimeout = 600000;
server.listen(0, '127.0.0.1', 4096, () => console.log(server.address().port));
