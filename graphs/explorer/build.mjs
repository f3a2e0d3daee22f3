// Builds src/main.tsx into viewer.js, src/plot.ts, which the viewer starts when it draws a chart, into charts.js, and
// src/live/main.tsx, the page of `sfc serve`, into live.js, with the licences of what they bundle in viewer.licences.txt.
import { build } from "esbuild";
import { existsSync, readFileSync, writeFileSync } from "node:fs";

const result = await build({
  entryPoints: { viewer: "src/main.tsx", charts: "src/plot.ts", live: "src/live/main.tsx" },
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  charset: "ascii",
  metafile: true,
  outdir: ".",
  banner: {
    js: "/* Built from graphs/explorer/src by `npm run build`; licences of the libraries: viewer.licences.txt */",
  },
  logLevel: "warning",
});
const inputs = Object.values(result.metafile.outputs).flatMap((output) => Object.entries(output.inputs));
const packages = new Set();
for (const [path, { bytesInOutput }] of inputs) {
  const match = path.match(/.*node_modules\/((?:@[^/]+\/)?[^/]+)/);
  if (match && bytesInOutput) packages.add(match[0]);
}
const texts = [...packages].sort().map((folder) => {
  const { name, version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = ["LICENSE", "LICENSE.txt", "LICENSE.md"].map((f) => `${folder}/${f}`).find(existsSync);
  return `${name} ${version} (${license})\n\n${file ? readFileSync(file, "utf8").trim() : ""}\n`;
});
writeFileSync("viewer.licences.txt", texts.join(`\n${"-".repeat(80)}\n\n`));
