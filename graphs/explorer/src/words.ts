// How values and tokens read, whatever page they are on.

const SIGNS: Record<string, string> = { "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };

/** A token as a person can see it. */
export function visible(token: unknown): string {
  const shown = String(token).replace(/[\u0000-\u001f\u007f-\u00a0\ufffe\uffff]/g, (c) => SIGNS[c] ?? "�");
  return shown.trim() ? shown : shown.replaceAll(" ", "␣");
}

/** A signed number to two or three figures. */
export function number(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 100) text = value.toFixed(0);
  else if (size >= 0.095) text = value.toFixed(2);
  else if (size >= 0.00095) text = String(Number(value.toPrecision(2)));
  else text = value.toExponential(0);
  return (value > 0 ? "+" : "") + text.replaceAll("-", "−");
}

/** A number to three figures, without a sign in front where it is positive. */
export function plain(value: number): string {
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text =
    size >= 1000 ? value.toFixed(0) : size >= 0.00095 ? String(Number(value.toPrecision(3))) : value.toExponential(0);
  return text.replaceAll("-", "−");
}
export const percent = (share: number) => `${plain(Number((share * 100).toPrecision(3)))} %`;
export const range = (interval: [number, number]) => `[${number(interval[0])}, ${number(interval[1])}]`;
export const count = (n: number, thing: string) => `${n} ${thing}${n === 1 ? "" : "s"}`;
