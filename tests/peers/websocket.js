// websocket.js - the `ws` package as a server that echoes, and as a client that checks. websocket.py runs it.
//   node websocket.js serve            prints its port
//   node websocket.js ask URL          prints "ok" when all sessions were right
const { WebSocket, WebSocketServer } = require("ws");
const crypto = require("crypto");

function fail(what) {
  console.error(what);
  process.exit(1);
}

function serve() {
  const server = new WebSocketServer({ host: "127.0.0.1", port: 0, maxPayload: 1 << 24 }, () => console.log(server.address().port));
  server.on("connection", (socket) => socket.on("message", (data, binary) => {
    if (!binary && data.toString() === "close me") socket.close(4001, "as told");
    else socket.send(data, { binary });
  }));
}

// One answer to one message; every session ends with the server's close.
async function session(url, n) {
  const socket = new WebSocket(url, { maxPayload: 1 << 24 });
  const queue = [];
  let wake = () => {};
  const put = (kind) => (...args) => { queue.push([kind, ...args]); wake(); };
  for (const kind of ["open", "message", "pong", "close", "error"]) socket.on(kind, put(kind));
  const next = async (kind) => {
    while (!queue.length) await new Promise((done) => { wake = done; });
    const event = queue.shift();
    if (event[0] !== kind) fail(`session ${n}: ${event} instead of ${kind}`);
    return event.slice(1);
  };
  await next("open");
  const text = `session ${n}: caf\u00e9`;
  socket.send(text);
  if ((await next("message"))[0].toString() !== text) fail("text");
  const bytes = crypto.randomBytes(n === 0 ? 1 << 20 : 1000 * n);
  socket.send(bytes);
  const [echo, binary] = await next("message");
  if (!binary || !echo.equals(bytes)) fail("bytes");
  socket.ping("are you there");
  if ((await next("pong"))[0].toString() !== "are you there") fail("pong");
  socket.send("close me");
  const [code, reason] = await next("close");
  if (code !== 4001 || reason.toString() !== "as told") fail(`closed with ${code}`);
}

if (process.argv[2] === "serve") serve();
else Promise.all([...Array(20).keys()].map((n) => session(process.argv[3], n))).then(() => console.log("ok"), (error) => fail(error));
