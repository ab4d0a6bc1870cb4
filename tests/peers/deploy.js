// deploy.js - what deploy.py asks of npm packages (kubernetes-models, yaml, @vscode/tree-sitter-wasm).
//   node deploy.js kubernetes <manifests.yaml     {"documents": [...], "problems": [...]}
//   node deploy.js script LANGUAGE FILE           {"errors": [...], "calls": [[verb, word...]...], "unknown": [variable...]}; unknown: never set, or never read
const fs = require("fs");
const path = require("path");

// ---- Kubernetes: the schemas, and, as those let unknown fields pass, the fields of the types they are made from

function typeOf(file) {
  const text = fs.readFileSync(file, "utf8");
  const imports = {};
  for (const [, names, from] of text.matchAll(/import \{([^}]*)\} from "([^"]+)"/g))
    for (const n of names.split(",")) imports[n.trim()] = from;
  const body = text.match(/export interface \w+[^{]*\{([\s\S]*?)\n\}/);
  if (!body) return null; // an alias: a string, a number, a map
  const fields = {};
  for (const [, field, type] of body[1].matchAll(/^ {4}"([^"]+)"\??: ([\s\S]*?);$/gm)) fields[field] = type;
  return { fields, imports };
}

function unknown(value, file, at, problems) {
  const type = typeOf(file);
  if (!type) return;
  for (const [key, child] of Object.entries(value)) {
    const place = `${at}.${key}`;
    if (!(key in type.fields)) { problems.push(`${place}: no such field`); continue; }
    const name = (type.fields[key].match(/\bI\w+/) || [])[0];
    if (!name || !(name in type.imports) || typeof child !== "object") continue;
    const from = type.imports[name];
    const next = (from[0] === "." ? path.resolve(path.dirname(file), from) : require.resolve(from).replace(/\.js$/, "")) + ".d.ts";
    for (const [i, one] of (Array.isArray(child) ? child : [child]).entries())
      unknown(one, next, Array.isArray(child) ? `${place}[${i}]` : place, problems);
  }
}

function kubernetes() {
  const documents = require("yaml").parseAllDocuments(fs.readFileSync(0, "utf8")).map((d) => {
    if (d.errors.length) throw d.errors[0];
    return d.toJS();
  });
  const problems = [];
  for (const doc of documents) {
    const [group, version] = doc.apiVersion.includes("/") ? doc.apiVersion.split("/") : ["", doc.apiVersion];
    const module = ["kubernetes-models", group, version, doc.kind].filter(Boolean).join("/");
    const where = `${doc.kind} ${doc.metadata && doc.metadata.name}`;
    let Kind;
    try { Kind = require(module)[doc.kind]; } catch (error) { problems.push(`${where}: ${error.message.split("\n")[0]}`); continue; }
    try { new Kind(doc).validate(); } catch (error) { problems.push(`${where}: ${error.message}`); }
    unknown(doc, require.resolve(module).replace(/\.js$/, ".d.ts"), where, problems);
  }
  console.log(JSON.stringify({ documents, problems }));
}

// ---- the scripts: their commands in order, words without quotes, ${x} as $x

const VERBS = ["need", "step", "show", "run", "ask", "capture", "matches", "fail", "aws", "docker", "terraform"];
const OWN = ["usage", "fail", "step", "show", "run", "lastsaid", "capture", "ask", "need", "matches"]; // functions that are not looked into
const AUTOMATIC = ["_", "args", "env", "lastexitcode", "psscriptroot", "matches", "true", "false", "null", "erroractionpreference",
  "psnativecommanduseerroractionpreference"];

const children = (node) => Array.from({ length: node.childCount }, (_, i) => node.child(i));
const plain = (word) => word.replace(/\$\{(\w+)\}/g, "$$$1");

function word(node) { // one word of a shell, or of PowerShell
  if (["raw_string", "verbatim_string_characters"].includes(node.type)) return node.text.slice(1, -1);
  if (["string", "expandable_string_literal"].includes(node.type)) return plain(node.text.slice(1, -1));
  if (node.type === "concatenation") return children(node).map(word).join("");
  return plain(node.text);
}

function shellWords(command) {
  return children(command).filter((c) => !/redirect/.test(c.type)).map(word);
}

function powershellWords(command) {
  const words = [];
  const leaves = ["verbatim_string_characters", "expandable_string_literal", "variable", "generic_token", "command_parameter",
    "decimal_integer_literal"];
  (function walk(node) {
    if (leaves.includes(node.type)) words.push(word(node));
    else if (node.type === "command_name") words.push(node.text);
    else if (!/redirection/.test(node.type)) children(node).forEach(walk);
  })(command);
  return words;
}

async function script(language, file) {
  const wasm = path.join(path.dirname(require.resolve("@vscode/tree-sitter-wasm/package.json")), "wasm");
  const { Parser, Language } = require(path.join(wasm, "tree-sitter.js"));
  await Parser.init();
  const parser = new Parser();
  parser.setLanguage(await Language.load(path.join(wasm, `tree-sitter-${language}.wasm`)));
  const errors = [], calls = [], used = {}, set = new Set(AUTOMATIC);
  const name = (text) => text.replace(/[$@{}]/g, "").replace(/^script:|^global:/i, "").toLowerCase();
  (function walk(node, own) {
    if (node.type === "ERROR" || node.isMissing) errors.push(`line ${node.startPosition.row + 1}: ${node.text.slice(0, 60)}`);
    if (["function_definition", "function_statement"].includes(node.type)) {
      const called = children(node).find((c) => ["word", "function_name"].includes(c.type)).text.toLowerCase().replace(/_/g, "");
      if (OWN.includes(called)) own = true;
    }
    if (node.type === "command" && !own) {
      const words = (language === "bash" ? shellWords : powershellWords)(node);
      words[0] = words[0].toLowerCase();
      if (VERBS.includes(words[0])) calls.push(words);
    }
    if (node.type === "variable" && language === "powershell") used[name(node.text)] = (used[name(node.text)] || 0) + 1;
    if (node.type === "left_assignment_expression") (node.text.match(/\$[\w:]+/g) || []).forEach((v) => set.add(name(v)));
    if (node.type === "script_parameter") set.add(name(node.text.match(/\$\w+/)[0]));
    if (node.type === "foreach_statement") set.add(name(node.text.match(/\$\w+/)[0]));
    children(node).forEach((c) => walk(c, own));
  })(parser.parse(fs.readFileSync(file, "utf8")).rootNode, false);
  const unknown = Object.keys(used).filter((v) => !/^env:/.test(v) && !AUTOMATIC.includes(v) && (!set.has(v) || used[v] === 1));
  console.log(JSON.stringify({ errors, calls, unknown }));
}

if (process.argv[2] === "kubernetes") kubernetes();
else script(process.argv[3], process.argv[4]);
