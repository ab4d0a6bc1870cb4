// lambda.js - @vercel/fun as the Runtime API server: runs DIR/bootstrap, and sends it the lines of stdin. lambda.py runs it.
//   node lambda.js DIR     prints the pid's state before each event and each answer, as lines of JSON
const fs = require("fs");
const { createFunction } = require("@vercel/fun");

// The children of this process, as "pid state".
function children() {
  const found = [];
  for (const pid of fs.readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      const [state, parent] = fs.readFileSync(`/proc/${pid}/stat`, "latin1").replace(/^.*\) /s, "").split(" ");
      if (Number(parent) === process.pid) found.push({ pid: Number(pid), state });
    } catch {
      continue; // it is gone
    }
  }
  return found;
}

async function main() {
  const variables = JSON.parse(process.env.VARIABLES || "{}");
  const lambda = await createFunction({
    Code: { Directory: process.argv[2] }, Handler: "x", Runtime: "provided", Environment: { Variables: variables },
    AccessKeyId: "AKID", SecretAccessKey: "secret",
  });
  console.log(JSON.stringify({ ready: true }));
  for await (const line of require("readline").createInterface({ input: process.stdin })) {
    const before = children();
    const result = await lambda.invoke({ InvocationType: "RequestResponse", Payload: line });
    console.log(JSON.stringify({ before, after: children(), error: result.FunctionError || null, payload: String(result.Payload) }));
  }
  await lambda.destroy();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
