#!/bin/sh
# The command line tool, from outside: exit status, what goes to which stream, numbers that must come out. A failure
# means that a script around the tool would take an error for success (or the reverse), that a user is not told what
# is wrong and where, or that text, score, plan or inspection changed. DSV3=path tests another build of the tool.
. tests/lib.sh
tool=${DSV3:-build/dsv3}
tmp=build/tool
micro=examples/models/micro
rm -rf $tmp
mkdir -p $tmp

# Runs the tool: $status, and the streams in $tmp/out and $tmp/err.
run() {
    "$tool" "$@" > $tmp/out 2> $tmp/err < /dev/null
    status=$?
}
fail() { bad "$1"; head -n 3 $tmp/err >&2; }
# good NAME ARGS...: status 0 and nothing on stderr.
good() {
    name=$1
    shift
    run "$@"
    if [ $status = 0 ] && [ ! -s $tmp/err ]; then ok; else fail "$name: status $status"; fi
}
# refused NAME TEXT ARGS...: status 1, nothing on stdout, one line on stderr that names TEXT.
refused() {
    name=$1 text=$2
    shift 2
    run "$@"
    if [ $status = 1 ] && [ ! -s $tmp/out ] && [ "$(wc -l < $tmp/err)" -eq 1 ] && grep -q '^dsv3: ' $tmp/err &&
        grep -qF -e "$text" $tmp/err; then ok; else fail "$name: status $status, expected 1 and '$text'"; fi
}
# misused NAME TEXT ARGS...: status 2, nothing on stdout, stderr names TEXT.
misused() {
    name=$1 text=$2
    shift 2
    run "$@"
    if [ $status = 2 ] && [ ! -s $tmp/out ] && grep -qF -e "$text" $tmp/err; then ok; else
        fail "$name: status $status, expected 2 and '$text'"
    fi
}
# shows NAME TEXT: the output of the last run has a line that matches.
shows() { if grep -q -e "$2" $tmp/out; then ok; else fail "$1: no '$2' in the output"; fi; }
same() { if cmp -s "$2" "$3"; then ok; else bad "$1: $2 and $3 differ"; fi; }
differ() { if cmp -s "$2" "$3"; then bad "$1: $2 and $3 are equal"; else ok; fi; }
equal() { if [ "$2" = "$3" ]; then ok; else bad "$1: '$2' is not '$3'"; fi; }

# ---- Usage

misused "no arguments" "usage: dsv3"
misused "unknown command" "unknown command frobnicate" frobnicate
misused "empty command" "unknown command" ""
misused "option for a command" "unknown command --threads" --threads 1
for option in --help -h help; do
    good "$option" $option
    shows "$option" '^usage: dsv3 COMMAND'
done
good "version" --version
shows "version" '^dsv3 [0-9]*\.[0-9]*\.[0-9]*$'
for command in generate score route plan inspect; do
    for option in --help -h; do
        good "$command $option" $command $option
        shows "$command $option" "^usage: dsv3 $command "
    done
    good "$command --help behind an operand" $command nowhere --help
    misused "$command: no operand" "operand is missing: DIR" $command
    misused "$command: unknown option" "unknown option --frobnicate" $command --frobnicate
    misused "$command: unknown option behind an operand" "unknown option -x" $command $micro -x
    misused "$command: usage names the command" "dsv3 $command --help" $command
done
for command in score route; do misused "$command: one operand" "operand is missing: FILE" $command $micro; done
for command in generate plan inspect; do misused "$command: two operands" "unexpected argument b" $command a b; done
for command in score route; do misused "$command: three operands" "unexpected argument c" $command a b c; done
for option in -p -n --prompt-cache --temp --top-p --top-k --min-p --repeat-penalty --logit-bias --stop --seed --context --cache --attention --threads; do
    misused "generate $option without a value" "missing behind $option" generate $micro $option
done
for option in --last --context --cache --attention --threads; do
    misused "score $option without a value" "missing behind $option" score $micro LICENSE $option
done
for option in --last --context --cache --attention --threads --svg --csv; do
    misused "route $option without a value" "missing behind $option" route $micro LICENSE $option
done
for option in --context --batch --rows --type --threads; do
    misused "plan $option without a value" "missing behind $option" plan micro $option
done
for pair in "--tmp --temp" "--temperature --temp" "--thread --threads" "--tempp=1 --temp" "-temp --temp" "--adaptiv --adaptive"; do
    misused "near ${pair% *}" "unknown option ${pair% *}; did you mean ${pair#* }?" generate $micro "${pair% *}"
done
misused "near nothing" "unknown option --frob (see" generate $micro --frob
misused "a command with a slip" "unknown command genrate; did you mean generate?" genrate $micro
misused "flag with a value" "no value is expected behind --stats" generate $micro --stats=1
refused "--name=value" "--top-p: expected 0 to 1, found 2" generate $micro --top-p=2
refused "whole numbers are printed whole" "--context: expected 1 to 16777216, found 0" generate $micro --context=0
refused "operand behind --" "--help/config.json" plan -- --help
misused "operands behind --" "unexpected argument --help" plan micro -- --help

# ---- Values of options

for value in NaN nan -1 1e999 inf -inf abc '' 1x 0x 2,5; do
    for option in --temp --top-p --min-p --repeat-penalty --logit-bias; do
        refused "generate $option '$value'" "$option: expected" generate $micro $option "$value" -n 1
    done
    for option in -n --seed --threads --context --top-k; do
        refused "generate $option '$value'" "$option: expected" generate $micro $option "$value"
    done
    for option in --last --threads --context; do
        for command in score route; do
            refused "$command $option '$value'" "$option: expected" $command $micro LICENSE $option "$value"
        done
    done
    for option in --context --batch --rows --threads; do
        refused "plan $option '$value'" "$option: expected" plan micro $option "$value"
    done
done
for option in -n --seed --threads --context; do
    for value in 1.5 1e1 0x10 99999999999999999999; do
        refused "generate $option $value" "$option: expected" generate $micro $option $value
    done
done
for option in -n --context --threads --top-k; do
    refused "generate $option 0" "$option: expected 1 to" generate $micro $option 0
done
for option in --context --batch --rows --threads; do
    refused "plan $option 0" "$option: expected 1 to" plan micro $option 0
done
refused "--pack and --no-pack" "--pack and --no-pack exclude each other" generate $micro --pack --no-pack -n 1
for value in 30 30: :1 1:2:3 '1 :2' 30:nan 30:inf a:1 1:b; do
    refused "--logit-bias '$value'" "--logit-bias: expected" generate $micro --logit-bias "$value" -n 1
done
for value in 256:1 -1:1 99999999999999999999:1; do
    refused "--logit-bias $value" "--logit-bias: token id: expected below 256, found ${value%%:*}" generate $micro --logit-bias=$value -n 1
done
refused "--stop ''" "--stop: expected a value" generate $micro --stop '' -n 1
refused "--stop, ids" "--stop: expected a text, found ' '" generate $micro --ids --stop ' ' -n 1
refused "--stop, ids outside" "--stop: token id at byte 2: expected below 256, found 256" generate $micro --ids --stop '1 256' -n 1
refused "--top-p above 1" "--top-p: expected 0 to 1, found 1.01" generate $micro --top-p 1.01
for command in score route; do
    refused "$command --last 0" "--last: expected" $command $micro LICENSE --last 0
    refused "$command --last 101" "--last: expected" $command $micro LICENSE --last 101
done
refused "--threads 5000" "--threads: expected 1 to 4096, found 5000" generate $micro --threads 5000
for text in f32 F16 F8_E4M3 I32 ''; do
    refused "generate --cache '$text'" "--cache: expected F32 or BF16, found '$text'" generate $micro --cache "$text" -n 1
    for command in score route; do
        refused "$command --cache '$text'" "--cache: expected F32 or BF16, found '$text'" \
            $command $micro LICENSE --cache "$text"
    done
done
for text in Absorbed auto2 ''; do
    refused "generate --attention '$text'" "--attention: expected auto, absorbed or expanded, found '$text'" \
        generate $micro --attention "$text" -n 1
    refused "route --attention '$text'" "--attention: expected auto, absorbed or expanded, found '$text'" \
        route $micro LICENSE --attention "$text"
done
for text in bf16 F64 FP8 ''; do
    refused "plan --type '$text'" "--type: expected F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0, found '$text'" plan micro --type "$text"
done

# ---- Directories and files

# copy NAME: a new directory with the micro model.
copy() {
    rm -rf "${tmp:?}/$1"
    mkdir $tmp/"$1"
    cp $micro/config.json $micro/model.safetensors $tmp/"$1"
}
# everywhere NAME TEXT DIRECTORY: refused by every command that binds a model.
everywhere() {
    refused "generate: $1" "$2" generate "$3" -n 1
    refused "score: $1" "$2" score "$3" LICENSE
    refused "route: $1" "$2" route "$3" LICENSE
}
everywhere "missing directory" $tmp/none/config.json $tmp/none
refused "plan: missing directory" "$tmp/none/config.json: does not exist" plan $tmp/none
refused "plan: unknown name" deepseek-v9/config.json plan deepseek-v9
refused "plan: known names" "names known here are deepseek-v3," plan deepseek-v9
misused "plan: empty name" "an operand is empty" plan ""
refused "inspect: missing directory" $tmp/none inspect $tmp/none
refused "inspect: missing file" $tmp/none.safetensors inspect $tmp/none.safetensors
everywhere "file for a directory" LICENSE/config.json LICENSE
refused "plan: file for a directory" LICENSE/config.json plan LICENSE
refused "inspect: file for a directory" LICENSE inspect LICENSE
mkdir $tmp/empty
everywhere "directory without config.json" $tmp/empty/config.json $tmp/empty
refused "plan: directory without config.json" $tmp/empty/config.json plan $tmp/empty
refused "inspect: empty directory" $tmp/empty inspect $tmp/empty
long=$(printf '%05000d' 0)
refused "plan: path too long" "path is too long" plan "$long"
refused "plan: a path with two lines" "?" plan "a
b"

copy broken
for text in '' '{' '[]' 'null' '{"vocab_size": 256' '{"vocab_size": "256"}'; do
    printf '%s' "$text" > $tmp/broken/config.json
    everywhere "config.json is '$text'" $tmp/broken/config.json $tmp/broken
    refused "plan: config.json is '$text'" $tmp/broken/config.json plan $tmp/broken
done
# edited NAME TEXT SED-EXPRESSION: config.json of micro with a change.
edited() {
    sed "$3" $micro/config.json > $tmp/broken/config.json
    everywhere "$1" "$2" $tmp/broken
}
edited "no hidden_size" "hidden_size: is missing" '/"hidden_size"/d'
edited "hidden_size 0" "hidden_size: is too small" 's/"hidden_size": 64/"hidden_size": 0/'
edited "hidden_size null" "hidden_size: must not be null" 's/"hidden_size": 64/"hidden_size": null/'
edited "vocab_size 10^12" "vocab_size" 's/"vocab_size": 256/"vocab_size": 1000000000000/'
edited "unknown scoring" "scoring_func" 's/"sigmoid"/"tanh"/'
edited "wrong vocabulary" "model.embed_tokens.weight: has the wrong shape (expected 255 x 64, found 256 x 64)" \
    's/"vocab_size": 256/"vocab_size": 255/'
edited "wrong width" "model.embed_tokens.weight: has the wrong shape (expected 256 x 32, found 256 x 64)" \
    's/"hidden_size": 64/"hidden_size": 32/'
edited "queries with a rank" "model.layers.0.self_attn.q_a_proj.weight: tensor missing" \
    's/"q_lora_rank": null/"q_lora_rank": 7/'
edited "the MTP module as a layer" "model.layers.4" \
    's/"num_hidden_layers": 3/"num_hidden_layers": 5/;s/"num_nextn_predict_layers": 1/"num_nextn_predict_layers": 0/'
edited "more experts" "model.layers.1.mlp.experts.8.gate_proj.weight: tensor missing" 's/"n_routed_experts": 8/"n_routed_experts": 16/'

copy cut
size=$(wc -c < $micro/model.safetensors)
for length in 0 1 7 8 9 100 1000 20000 $((size / 2)) $((size - 1)); do
    head -c "$length" $micro/model.safetensors > $tmp/cut/model.safetensors
    everywhere "model.safetensors of $length bytes" $tmp/cut/model.safetensors $tmp/cut
    refused "inspect: model.safetensors of $length bytes" $tmp/cut/model.safetensors inspect $tmp/cut
    refused "inspect: file of $length bytes" $tmp/cut/model.safetensors inspect $tmp/cut/model.safetensors
done
rm $tmp/cut/model.safetensors
everywhere "no weights" "$tmp/cut: expected a directory with model.safetensors" $tmp/cut
mkdir $tmp/cut/model.safetensors
everywhere "directory for the weights" $tmp/cut/model.safetensors $tmp/cut
good "plan needs no weights" plan $tmp/cut

: > $tmp/nothing
printf 'a' > $tmp/byte
printf 'ab' > $tmp/two
refused "score: empty file" "$tmp/nothing: expected at least 2 tokens, found 0" score $micro $tmp/nothing
refused "score: one byte" "$tmp/byte: expected at least 2 tokens, found 1" score $micro $tmp/byte
good "score: two bytes" score $micro $tmp/two
shows "score: two bytes" '^tokens      1$'
shows "score: the module has no target there" '^perplexity '
equal "score: the module has no target there" "$(wc -l < $tmp/out | tr -d ' ')" 4
refused "score --mtp 2" "--mtp: expected at most 1, the modules of this model, found 2" score $micro LICENSE --mtp 2
good "score --mtp 0" score $micro $tmp/two --mtp 0
refused "score: missing file" "$tmp/none: cannot be opened" score $micro $tmp/none
refused "score: directory" "$tmp/empty: cannot be read" score $micro $tmp/empty
chmod 0 $tmp/two
[ -r $tmp/two ] || refused "score: unreadable file" "$tmp/two: cannot be opened" score $micro $tmp/two # root reads all
chmod 600 $tmp/two
refused "score: --last leaves one token" "expected at least 2 tokens, found 1" score $micro $tmp/two --last 50

# ---- Token ids

for ids in 256 '10 256' 99999999999999999999 '1,2,4294967296'; do
    refused "--ids $ids" "expected below 256, found ${ids##*[ ,]}" generate $micro --ids -p "$ids" -n 1
done
for ids in -1 'a' '1 x' 1.5 '5 -3' 0x10; do
    refused "--ids $ids" "-p: expected token ids" generate $micro --ids -p "$ids" -n 1
done
printf '1 2 3 400\n' > $tmp/ids
refused "score --ids" "$tmp/ids: token id at byte 6: expected below 256, found 400" score $micro $tmp/ids --ids
printf '1 2\0003' > $tmp/ids
refused "score --ids, zero byte" "$tmp/ids: expected token ids, found another character at byte 3" \
    score $micro $tmp/ids --ids
# Micro with another vocabulary: [256, 64] BF16 are as many bytes as [128, 64] F32.
copy v128
header=$(($(od -An -v -tu1 -N 2 $micro/model.safetensors | awk '{ print $1 + 256 * $2 }') + 8))
{ head -c 8 $micro/model.safetensors && printf '%s' "$(head -c $header $micro/model.safetensors | tail -c +9 |
    sed 's/"dtype":"BF16","shape":\[256,64\]/"dtype":"F32","shape":[128,64] /g')" &&
    tail -c +$((header + 1)) $micro/model.safetensors; } > $tmp/v128.safetensors
mv $tmp/v128.safetensors $tmp/v128/model.safetensors
sed 's/"vocab_size": 256/"vocab_size": 128/' $micro/config.json > $tmp/v128/config.json
refused "text without a tokenizer" "this model has 128 tokens" generate $tmp/v128 -p x -n 1
refused "text without a tokenizer, no prompt" "use --ids" generate $tmp/v128 -n 1
refused "score: text without a tokenizer" "LICENSE: this model has 128 tokens" score $tmp/v128 LICENSE
refused "--ids, other vocabulary" "expected below 128, found 128" generate $tmp/v128 --ids -p 128 -n 1
good "--ids, other vocabulary" generate $tmp/v128 --ids -p 127 -n 3
equal "--ids, other vocabulary" "$(wc -w < $tmp/out | tr -d ' ')" 3
printf '1 2 3' > $tmp/list
good "score --ids, other vocabulary" score $tmp/v128 $tmp/list --ids

# ---- generate

# text FILE ARGS...: what micro writes.
text() {
    file=$tmp/$1
    shift
    good "generate $*" generate $micro "$@"
    cp $tmp/out "$file"
}
text a -n 60 --seed 7
text b -n 60 --seed 7
same "same seed" $tmp/a $tmp/b
equal "-n 60" "$(wc -c < $tmp/a | tr -d ' ')" 60
text b -n 60 --seed 8
differ "another seed" $tmp/a $tmp/b
text b -n=60 --seed=7
same "--name=value" $tmp/a $tmp/b
text b -n 60 --seed 7 -p 'a=b'
text c -n 60 --seed 7 -p 'a=b' --echo
{ printf 'a=b' && cat $tmp/b && echo; } > $tmp/d
same "--echo" $tmp/d $tmp/c
text b -n 60 --seed 7 --temp 1.5 --top-p 1
differ "another temperature" $tmp/a $tmp/b
text b -n 20 --seed 7
head -c 20 $tmp/a > $tmp/c
same "the first 20 of 60" $tmp/b $tmp/c
text b -n 60 --seed 7 --context 512
same "a longer cache" $tmp/a $tmp/b
for n in 1 2 127 128 129 511; do
    text b -n $n
    equal "-n $n" "$(wc -c < $tmp/b | tr -d ' ')" $n
done
text greedy -n 80 --temp 0 -p "It is a truth"
for options in "--threads 1" "--seed 99" "--top-p 0 --temp 1" "--attention absorbed" "--attention expanded" \
    "--context 400" "--top-p 0.5"; do
    text b -n 80 --temp 0 -p "It is a truth" $options
    same "greedy, $options" $tmp/greedy $tmp/b
done
run generate $micro -n 80 --temp 0 -p "It is a truth" --threads 2 # without OpenMP with a note
equal "--threads 2" $status 0
same "greedy, 2 threads" $tmp/greedy $tmp/out
text b -n 80 --temp 0 -p "It is a truth" --cache BF16
equal "--cache BF16" "$(wc -c < $tmp/b | tr -d ' ')" 80
text a -n 12 --ids --temp 0 -p "73 116 32"
text b -n 12 --temp 0 -p "It "
equal "--ids writes the bytes of the text" "$(cat $tmp/a)" "$(od -An -v -tu1 $tmp/b | tr -s ' \n' ' ' | sed 's/^ //')"
good "--ids roundtrip" generate $micro --ids -n 6 --temp 0 -p "[73, 116, 32, $(cut -d' ' -f1-6 $tmp/a | tr ' ' ',')]"
equal "--ids roundtrip" "$(cut -d' ' -f1-6 $tmp/out)" "$(cut -d' ' -f7-12 $tmp/a)"
text a -n 30 --temp 0
text b -n 30 --temp 0 -p ""
same "empty prompt" $tmp/a $tmp/b
text b -n 30 --temp 0 -p "
"
same "the begin-of-text token is a line feed" $tmp/a $tmp/b

prompt=$(printf '%0600d' 0)
refused "prompt longer than the model's context" "expected at most 512 tokens, found 600" \
    generate $micro -p "$prompt" -n 1
refused "prompt longer than --context" "expected at most 3 tokens, found 4" generate $micro -p abcd --context 3 -n 1
good "prompt as long as the context" generate $micro -p abcd --context 4 -n 1
run generate $micro -p "$prompt" --context 700 -n 100
equal "beyond the model's context" "$(wc -c < $tmp/out | tr -d ' ') $(cat $tmp/err)" \
    "100 dsv3: warning: a context of 700 positions, more than the 512 that the model was made for"
run generate $micro -p abcd --context 10 -n 50
equal "full context: status" $status 0
equal "full context: 10 positions and what follows the last" "$(wc -c < $tmp/out | tr -d ' ')" 7
equal "full context: note" "$(cat $tmp/err)" "dsv3: the context of 10 positions is full after 7 of 50 tokens"
run generate $micro -n 5 --stats
equal "--stats: status" $status 0
equal "--stats: text" "$(wc -c < $tmp/out | tr -d ' ')" 5
if grep -q '^load ' $tmp/err && grep -q '^text     5 tokens' $tmp/err; then ok; else fail "--stats"; fi

# Drafts change nothing at temperature 0, in any number, and are counted.
text greedy -n 200 --temp 0 -p "It is a truth"
for options in "--mtp 1" "--mtp 2" "--mtp 4" "--mtp 15" "--mtp 3 --adaptive" "--mtp 2 --threads 1" "--mtp 2 --cache F32"; do
    text b -n 200 --temp 0 -p "It is a truth" $options
    same "greedy, $options" $tmp/greedy $tmp/b
done
text a -n 200 --temp 0 -p "It is a truth" --cache BF16
text b -n 200 --temp 0 -p "It is a truth" --cache BF16 --mtp 3
same "greedy, BF16 cache, --mtp 3" $tmp/a $tmp/b
for n in 1 2 3 7; do
    text b -n $n --mtp 4
    equal "-n $n --mtp 4" "$(wc -c < $tmp/b | tr -d ' ')" $n
done
run generate $micro -p abcd --context 10 -n 50 --mtp 4
equal "full context, --mtp 4" "$status $(wc -c < $tmp/out | tr -d ' ') $(cat $tmp/err)" \
    "0 7 dsv3: the context of 10 positions is full after 7 of 50 tokens"
run generate $micro -n 100 --temp 0 --mtp 2 --stats
if grep -q '^drafts   [12]\.[0-9][0-9] tokens a step; accepted [0-9.]* % [0-9.]* %$' $tmp/err; then ok; else
    fail "--stats of drafts"
fi
refused "--mtp -1" "--mtp: expected 0 to 15, found -1" generate $micro --mtp -1
refused "--mtp 16" "--mtp: expected 0 to 15, found 16" generate $micro --mtp 16
refused "--mtp without modules" "--mtp: tests/golden/v2 has no MTP modules" generate tests/golden/v2 --mtp 1
good "--mtp 0 without modules" generate tests/golden/v2 --mtp 0 -n 3 -p x

# Steering: one token left is greedy text, and drafts change nothing.
text greedy -n 80 --temp 0 -p "It is a truth"
text b -n 80 -p "It is a truth" --top-k 1 --top-p 1
same "--top-k 1" $tmp/greedy $tmp/b
text b -n 80 -p "It is a truth" --min-p 1 --top-p 1 --mtp 3
same "--min-p 1" $tmp/greedy $tmp/b
text b -n 80 --temp 0 -p "It is a truth" --repeat-penalty 1 --logit-bias 32:0 --top-k 256 --min-p 0
same "steering that changes nothing" $tmp/greedy $tmp/b
text c -n 80 --temp 0 -p "It is a truth" --repeat-penalty 1.3
differ "--repeat-penalty" $tmp/greedy $tmp/c
text d -n 80 --temp 0 -p "It is a truth" --logit-bias 32:-inf --logit-bias=101:-1e30 --logit-bias 97:1.5
equal "--logit-bias forbids" "$(tr -cd ' e' < $tmp/d | wc -c | tr -d ' ')" 0
for mtp in 1 3; do
    text b -n 80 --temp 0 -p "It is a truth" --repeat-penalty 1.3 --mtp $mtp
    same "--repeat-penalty, --mtp $mtp" $tmp/c $tmp/b
    text b -n 80 --temp 0 -p "It is a truth" --logit-bias 32:-inf --logit-bias=101:-1e30 --logit-bias 97:1.5 --mtp $mtp
    same "--logit-bias, --mtp $mtp" $tmp/d $tmp/b
done
text b -n 20 --logit-bias 65:1e30
equal "--logit-bias, nothing else" "$(cat $tmp/b)" AAAAAAAAAAAAAAAAAAAA

# Stop texts: the output is what comes before the first of them, and nothing more.
before() { awk -v stop="$2" 'BEGIN { RS = "\001" } { n = index($0, stop); printf "%s", n ? substr($0, 1, n - 1) : $0 }' "$1"; }
part=$(head -c 40 $tmp/greedy | tail -c 7)
for stop in "$part" e " of" zzz "$(head -c 5 $tmp/greedy)"; do
    before $tmp/greedy "$stop" > $tmp/c
    for mtp in 0 3; do
        text b -n 80 --temp 0 -p "It is a truth" --stop "$stop" --mtp $mtp
        same "--stop '$stop', --mtp $mtp" $tmp/c $tmp/b
    done
done
text b -n 80 --temp 0 -p "It is a truth" --stop zzz --stop "$part" --stop "${part}x"
before $tmp/greedy "$part" > $tmp/c
same "three of --stop" $tmp/c $tmp/b
text b -n 60 --logit-bias 65:1e30 --stop AAB
equal "--stop, held back to the end" "$(wc -c < $tmp/b | tr -d ' ')" 60
text b -n 60 --logit-bias 10:1e30 -p x --stop '\n\n\n'
equal "--stop, escapes" "$(wc -c < $tmp/b | tr -d ' ')" 0
text b -n 12 --ids --temp 0 -p "73 116 32"
text c -n 12 --ids --temp 0 -p "73 116 32" --stop "$(cut -d' ' -f5-6 $tmp/b)"
equal "--stop, ids" "$(cat $tmp/c)" "$(cut -d' ' -f1-4 $tmp/b) "

# Every end-of-text token ends the text, of both files.
copy ends
second=$(head -c 4 $tmp/greedy | tail -c 1 | od -An -v -tu1 | tr -d ' ')
sed "s/\"eos_token_id\": null/\"eos_token_id\": [0, $second]/" $micro/config.json > $tmp/ends/config.json
before $tmp/greedy "$(head -c 4 $tmp/greedy | tail -c 1)" > $tmp/c
for mtp in 0 3; do
    good "a list of eos_token_id" generate $tmp/ends -n 80 --temp 0 -p "It is a truth" --mtp $mtp
    same "a list of eos_token_id, --mtp $mtp" $tmp/c $tmp/out
done
cp $micro/config.json $tmp/ends/config.json
echo "{\"eos_token_id\": [0, $second]}" > $tmp/ends/generation_config.json
good "generation_config.json" generate $tmp/ends -n 80 --temp 0 -p "It is a truth"
same "generation_config.json" $tmp/c $tmp/out
echo "{\"eos_token_id\": [0, 256]}" > $tmp/ends/generation_config.json
everywhere "generation_config.json" "generation_config.json: eos_token_id: is outside the vocabulary: expected below 256, found '256'" $tmp/ends
# ---- generate --prompt-cache

# cached NAME REUSED ARGS...: the text is that of the same call without a cache, and so many tokens were not read again.
cached() {
    name=$1 reused=$2
    shift 2
    run generate "$@" --attention absorbed
    cp $tmp/out $tmp/plain
    run generate "$@" --attention absorbed --prompt-cache $tmp/cache --stats
    if [ $status = 0 ]; then ok; else fail "--prompt-cache, $name: status $status"; fi
    same "--prompt-cache, $name: the text" $tmp/plain $tmp/out
    equal "--prompt-cache, $name: reused" "$(sed -n 's/^reused *\([0-9]*\) of .*/\1/p' $tmp/err)" "$reused"
    if [ -f $tmp/cache ] && [ ! -e $tmp/cache.tmp ]; then ok; else bad "--prompt-cache, $name: the file"; fi
}
# kept NAME TEXT ARGS...: refused with one line, and the file stays as it is.
kept() {
    name=$1 text=$2
    shift 2
    cp $tmp/cache $tmp/cache.before
    refused "--prompt-cache, $name" "$text" generate "$@" --prompt-cache $tmp/cache -n 2
    same "--prompt-cache, $name: the file" $tmp/cache.before $tmp/cache
}
cached "fresh" 0 $micro -p 'It is a truth' -n 20
cached "the same prompt" 12 $micro -p 'It is a truth' -n 20
cached "a shorter prompt" 4 $micro -p 'It is' -n 300 --seed 4
"$tool" generate $micro -p 'It is' -n 300 --seed 4 --echo --attention absorbed > $tmp/said
cached "the text goes on" 200 $micro -p "$(head -c 200 $tmp/said) and so" -n 5 --temp 0
cached "part of it" 6 $micro -p 'It is a t' -n 5 --temp 0
cached "it begins alike" 6 $micro -p 'It is not' -n 5 --temp 0
cached "another text" 0 $micro -p 'Emma' -n 5
kept "another model" "$tmp/cache: vocab_size: is not what was saved" $tmp/v128 --ids -p 1
kept "--mtp" "$tmp/cache: --mtp: expected 0, as it was written with, found 1; it is left" $micro -p Emma --mtp 1
kept "--cache" "$tmp/cache: --cache: expected F32, as it was written with, found BF16; it is left" $micro -p Emma --cache BF16
cp $tmp/cache $tmp/cache.before
refused "chat --prompt-cache of generate" "$tmp/cache: expected a text of dsv3 chat, found one of dsv3 generate; it is left" \
    chat $micro --prompt-cache $tmp/cache
same "chat --prompt-cache of generate" $tmp/cache.before $tmp/cache
copy other
printf '\125' | dd of=$tmp/other/model.safetensors bs=1 seek=$(($(wc -c < $tmp/other/model.safetensors) - 20)) conv=notrunc 2> /dev/null
kept "other weights" "$tmp/cache: tag: is not what was saved" $tmp/other -p Emma
head -c 4000 examples/text/austen.txt > $tmp/tuning
check "a tuned embedding: rows in its middle are others" "$tool" train --init $micro --freeze 'model.layers.*' --freeze 'lm_head*' \
    --freeze 'model.norm*' --weight-decay 0 --text $tmp/tuning --seq 12 --batch 2 --steps 2 --lr 0.1 --warmup 0 --type BF16 \
    --threads 1 --val 0 --out $tmp/rows
kept "other rows of the embedding" "$tmp/cache: tag: is not what was saved" $tmp/rows -p Emma
kept "--attention" "$tmp/cache: --attention: expected absorbed, as it was written with, found auto; it is left" $micro -p Emma
kept "--fast" "$tmp/cache: --fast: expected no, as it was written with, found yes; it is left" $micro -p Emma \
    --attention absorbed --fast
run generate $micro -p Emma -n 5 --attention absorbed --backend reference --prompt-cache $tmp/reference
if [ $status = 0 ]; then ok; else fail "--prompt-cache, --backend reference: status $status"; fi
run generate $micro -p Emma -n 5 --attention absorbed --prompt-cache $tmp/reference --stats
backend=$("$tool" generate $micro -n 1 --stats 2>&1 | sed -n 's/^machine *backend \([a-z0-9_]*\).*/\1/p')
if [ "$backend" = reference ] || { [ $status = 1 ] && grep -q -e \
    "$tmp/reference: --backend: expected reference, as it was written with, found $backend; it is left" $tmp/err; }
then ok; else fail "--prompt-cache, --backend $backend: status $status"; fi
cache_bytes=$(wc -c < $tmp/cache)
cp $tmp/cache $tmp/cache.whole
for at in 9 40 150 $((cache_bytes / 2)) $((cache_bytes - 30)) $((cache_bytes - 5)); do
    printf '\377' | dd of=$tmp/cache bs=1 seek=$at conv=notrunc 2> /dev/null
    kept "byte $at is another" "$tmp/cache: " $micro -p Emma
    cp $tmp/cache.whole $tmp/cache
done
# respelled NAME FROM TO: a letter of what it says of the text, of the same length.
respelled() {
    LC_ALL=C sed "1s/\"$2\"/\"$3\"/" $tmp/cache.whole > $tmp/cache
    differ "--prompt-cache, $1: is altered" $tmp/cache $tmp/cache.whole
    kept "$1" "$tmp/cache: is " $micro -p Emma --attention absorbed
    cp $tmp/cache.whole $tmp/cache
}
for key in 'written by' --mtp --cache --backend --attention --fast checksum; do respelled "$key" "$key" "${key%?}?"; done
respelled "no" no yo
for length in 0 100 $((cache_bytes / 2)) $((cache_bytes - 1)); do
    head -c $length $tmp/cache.whole > $tmp/cache
    kept "cut to $length bytes" "$tmp/cache: " $micro -p Emma
done
cp $micro/model.safetensors $tmp/cache
kept "a checkpoint" "$tmp/cache: is no prompt cache" $micro -p Emma
rm $tmp/cache
refused "--prompt-cache in no directory" "cannot be written" generate $micro --prompt-cache $tmp/nowhere/c -n 1
refused "--prompt-cache is a directory" "is a directory" generate $micro --prompt-cache $tmp -n 1
rm -f $tmp/cache $tmp/cache.link
ln -s cache $tmp/cache.link
for reused in 0 3; do # a link to nothing yet, and to a file
    run generate $micro -p Emma -n 5 --attention absorbed --prompt-cache $tmp/cache.link --stats
    equal "--prompt-cache, a link" "$status $(sed -n 's/^reused *\([0-9]*\) of .*/\1/p' $tmp/err)" "0 $reused"
    if [ -L $tmp/cache.link ] && [ -f $tmp/cache ] && [ ! -L $tmp/cache ]; then ok; else bad "--prompt-cache, a link"; fi
done
rm $tmp/cache
# What ends the text is of the call, not of the file.
copy ends_e
sed 's/"eos_token_id": null/"eos_token_id": 101/' $micro/config.json > $tmp/ends_e/config.json
cached "an end" 0 $tmp/ends_e -p 'It is a truth' -n 40 --temp 0
cached "no end" 12 $micro -p 'It is a truth' -n 40 --temp 0
cached "an end again" 12 $tmp/ends_e -p 'It is a truth' -n 40 --temp 0
rm $tmp/cache
cached "drafts" 0 examples/models/austen -p 'It is a truth' -n 20 --mtp 3 --temp 0 --cache BF16
cached "drafts, the same prompt" 12 examples/models/austen -p 'It is a truth' -n 20 --mtp 3 --temp 0 --cache BF16
for seed in 1 2 3; do
    cached "drafts, sampled" 12 examples/models/austen -p 'It is a truth' -n 20 --mtp 3 --temp 0.9 --seed $seed --cache BF16
done
cached "drafts, a longer prompt" 13 examples/models/austen -p 'It is a truth!?' -n 20 --mtp 3 --temp 0 --cache BF16

# ---- chat

# said NAME INPUT ARGS...: what chat answers, in $tmp/out.
said() {
    name=$1 input=$2
    shift 2
    printf "$input" | "$tool" chat $micro "$@" 2>&1 > $tmp/out | grep -v 'the reply is cut at' > $tmp/err
    status=0
    if [ $status = 0 ] && [ ! -s $tmp/err ]; then ok; else fail "$name: status $status"; fi
}
for option in --system --before --after --stop --stop-id --prompt-cache -n --mtp --temp; do
    misused "chat $option without a value" "missing behind $option" chat $micro $option
done
misused "chat: no operand" "operand is missing" chat
misused "chat: two operands" "unexpected argument b" chat a b
good "chat --help" chat --help
shows "chat --help" "^usage: dsv3 chat DIR"
refused "chat: missing directory" $tmp/none/config.json chat $tmp/none
refused "chat: text without a tokenizer" "use --ids" chat $tmp/v128
refused "chat: --stop-id" "--stop-id: expected below 256, found 256" chat $micro --stop-id 256
refused "chat: a long --system" "--system: is longer than the context" chat $micro --context 5 --system "123456"
said "chat: no turn" ''
equal "chat: no turn" "$(wc -c < $tmp/out | tr -d ' ')" 0
said "chat: one turn" 'It is a truth\n' --temp 0 -n 60
cp $tmp/out $tmp/a
text b --temp 0 -n 60 -p "

It is a truth

"
equal "chat: one turn is what generate writes" "$(cat $tmp/a)" "$(sed -n 1p $tmp/b)"
said "chat: the last line without its end" 'It is a truth' --temp 0 -n 60
same "chat: the last line without its end" $tmp/a $tmp/out
for options in "--mtp 1" "--mtp 4" "--mtp 2 --adaptive" "--threads 1"; do
    said "chat: turns" 'My dear\nWhat is it?\nAnd then?\n' --temp 0 -n 50
    cp $tmp/out $tmp/b
    equal "chat: three turns, three replies" "$(wc -l < $tmp/b | tr -d ' ')" 3
    said "chat $options" 'My dear\nWhat is it?\nAnd then?\n' --temp 0 -n 50 $options
    same "chat $options" $tmp/b $tmp/out
done
# A conversation in one go, and in two with a file between them.
for options in "" "--mtp 2"; do
    rm -f $tmp/talk
    said "chat: a conversation" 'My dear\nWhat is it?\n/undo\nAnd then?\n' --temp 0 -n 50 --attention absorbed $options
    cp $tmp/out $tmp/talked
    said "chat --prompt-cache" 'My dear\nWhat is it?\n/undo\n' --temp 0 -n 50 --attention absorbed --prompt-cache $tmp/talk $options
    cp $tmp/out $tmp/begun
    said "chat --prompt-cache, goes on" 'And then?\n' --temp 0 -n 50 --attention absorbed --prompt-cache $tmp/talk $options
    cat $tmp/begun $tmp/out > $tmp/both
    same "chat --prompt-cache $options" $tmp/talked $tmp/both
    said "chat --prompt-cache, forgets" '/undo\nMy dear\n' --temp 0 -n 50 --attention absorbed --prompt-cache $tmp/talk $options
    equal "chat --prompt-cache, forgets $options" "$(cat $tmp/out)" "$(sed -n 1p $tmp/talked)"
done
refused "chat --prompt-cache of another beginning" "$tmp/talk: begins with another text" chat $micro --mtp 2 --system Emma --prompt-cache $tmp/talk
refused "chat --prompt-cache, --context" "$tmp/talk: --context: expected more than" chat $micro --mtp 2 --context 20 --prompt-cache $tmp/talk
cp $tmp/talk $tmp/talk.before
refused "generate --prompt-cache of chat" "$tmp/talk: expected a text of dsv3 generate, found one of dsv3 chat; it is left" \
    generate $micro --mtp 2 -n 2 --prompt-cache $tmp/talk
same "generate --prompt-cache of chat" $tmp/talk.before $tmp/talk
said "chat: /undo" 'My dear\nNo\n/undo\nWhat is it?\nAnd then?\n' --temp 0 -n 50 --mtp 2
sed 2d $tmp/out > $tmp/c
same "chat: /undo" $tmp/b $tmp/c
said "chat: /undo far back" 'My dear\nOne\nTwo\nThree\nFour\n/undo\n/undo\n/undo\n/undo\nWhat is it?\nAnd then?\n' --temp 0 -n 50 --mtp 2
sed 2,5d $tmp/out > $tmp/c
same "chat: /undo far back" $tmp/b $tmp/c
said "chat: /reset" 'No\nNo\n/reset\nMy dear\nWhat is it?\nAnd then?\n' --temp 0 -n 50 --mtp 1
sed 1,2d $tmp/out > $tmp/c
same "chat: /reset" $tmp/b $tmp/c
said "chat: --stop" 'My dear\nWhat is it?\n' --temp 0 -n 50 --mtp 2 --stop ' of' --stop-id 10
cp $tmp/out $tmp/c
if grep -q ' of' $tmp/c; then fail "chat: --stop"; else ok; fi
said "chat: --stop, without drafts" 'My dear\nWhat is it?\n' --temp 0 -n 50 --stop ' of' --stop-id 10
same "chat: --stop, without drafts" $tmp/c $tmp/out
said "chat: steering" 'My dear\nWhat is it?\n' --temp 0 -n 50 --logit-bias 101:-inf --repeat-penalty 1.1
equal "chat: --logit-bias" "$(tr -cd e < $tmp/out | wc -c | tr -d ' ')" 0
said "chat: /quit" 'My dear\n/quit\nWhat is it?\n' --temp 0 -n 50
sed -n 1p $tmp/b > $tmp/c
same "chat: /quit" $tmp/c $tmp/out
said "chat: escapes" 'It is a truth\n' --temp 0 -n 60 --before '\n' --after '\n\n'
same "chat: escapes" $tmp/a $tmp/out
said "chat: --ids" '10 73 116\n32\n' --ids --temp 0 -n 5
equal "chat: --ids" "$(wc -w < $tmp/out | tr -d ' ')" 10
printf '/undo\n/nonsense\nMy dear\n/stats\n' | "$tool" chat $micro -n 10 > $tmp/out 2> $tmp/err
equal "chat: status after a wrong command" $? 0
if grep -q 'no turn to forget' $tmp/err && grep -q '/nonsense: expected' $tmp/err && grep -q '^memory ' $tmp/err; then
    ok
else
    fail "chat: commands"
fi
printf '%0100d\n1\n/reset\n12\n' 0 | "$tool" chat $micro --context 40 -n 10 > $tmp/out 2> $tmp/err
equal "chat: a turn too long" "$? $(grep -c 'does not fit' $tmp/err) $(wc -l < $tmp/out | tr -d ' ')" "0 1 2"
printf '1\n2\n3\n' | "$tool" chat $micro --context 20 -n 100 --stop-id 0 > $tmp/out 2> $tmp/err
equal "chat: full" "$? $(grep -c 'context is full' $tmp/err) $(grep -c 'does not fit' $tmp/err)" "0 1 2"

# ---- Streams

if [ -c /dev/full ]; then
    for command in "generate $micro -n 5" "score $micro $tmp/two" "route $micro $tmp/two" "plan micro" \
        "inspect $micro" --help --version "plan --help"; do
        "$tool" $command > /dev/full 2> $tmp/err
        equal "full disk: $command" "$? $(wc -l < $tmp/err | tr -d ' ')" "1 1"
        if grep -q '^dsv3: standard output: cannot be written' $tmp/err; then ok; else fail "full disk: $command"; fi
    done
fi
for command in "generate $micro -n 5" "score $micro $tmp/two" "route $micro $tmp/two" "plan micro" "inspect $micro" \
    --help --version; do
    "$tool" $command 2> $tmp/err >&-
    equal "stdout closed: $command" "$? $(wc -l < $tmp/err | tr -d ' ')" "1 1"
    "$tool" $command > $tmp/out 2>&-
    equal "stderr closed: $command" "$?" 0
    "$tool" $command > $tmp/out 2> $tmp/err <&-
    equal "stdin closed: $command" "$? $(wc -l < $tmp/err | tr -d ' ')" "0 0"
done
"$tool" generate $tmp/none 2>&- >&- <&-
equal "all closed" $? 1
"$tool" frobnicate 2>&- >&- <&-
equal "all closed, wrong usage" $? 2
(unset TERM && "$tool" generate $micro -n 60 --seed 7 > $tmp/b 2> $tmp/err)
text a -n 60 --seed 7
same "without TERM" $tmp/a $tmp/b
env -i "$tool" generate $micro -n 60 --seed 7 > $tmp/b 2> $tmp/err
same "without environment" $tmp/a $tmp/b
"$tool" generate $micro -n 400 --seed 7 2> $tmp/err | head -c 60 > $tmp/b
same "into a pipe that closes" $tmp/a $tmp/b
equal "into a pipe that closes: stderr" "$(cat $tmp/err)" ""
# On a terminal (where there is a `script` to make one) the prompt stands before the text and a line feed behind it.
if script -qec true /dev/null < /dev/null > /dev/null 2>&1; then
    script -qec "$tool generate $micro -n 12 --temp 0 -p 'It is'" /dev/null < /dev/null > $tmp/b 2> $tmp/err
    text a -n 12 --temp 0 -p 'It is'
    { printf 'It is' && cat $tmp/a && echo; } > $tmp/c
    tr -d '\r' < $tmp/b > $tmp/a
    same "terminal" $tmp/a $tmp/c
    script -qec "$tool score $micro LICENSE --context 8; $tool inspect $micro" /dev/null < /dev/null > $tmp/b 2> $tmp/err
    if grep -q 'nats/token' $tmp/b && grep -q '125 tensors, ' $tmp/b; then ok; else bad "terminal: score and inspect"; fi
fi

# ---- score

# nats ARGS...: the third line's number, in $nats
nats() {
    good "score $*" score "$@"
    nats=$(sed -n 's/^nats\/token  //p' $tmp/out)
}
# calc EXPRESSION: a number.
calc() { awk "BEGIN { printf \"%.5f\", $1 }"; }
# within NAME VALUE LOW HIGH
within() {
    if awk -v x="$2" -v low="$3" -v high="$4" 'BEGIN { exit !(x != "" && x >= low && x <= high) }'; then ok; else
        bad "$1: $2 is not between $3 and $4"
    fi
}
nats $micro examples/text/austen.txt --last 0.5 --threads 1
within "score --last 0.5" "$nats" 1.17 1.20
shows "score --last 0.5" '^tokens      20142$'
bits=$(sed -n 's/^bits.token *//p' $tmp/out)
within "bits" "$bits" "$(calc "$nats / log(2) - 1e-4")" "$(calc "$nats / log(2) + 1e-4")"
perplexity=$(sed -n 's/^perplexity *//p' $tmp/out)
within "mtp 1" "$(sed -n 's/^mtp 1  *\([0-9.]*\) nats.*/\1/p' $tmp/out)" 1.17 1.22
shows "mtp 1" ', 20102 tokens$'
within "perplexity" "$perplexity" "$(calc "exp($nats) - 1e-3")" "$(calc "exp($nats) + 1e-3")"
nats $micro examples/text/austen.txt --last 0.05 --threads 1
one=$nats
run score $micro examples/text/austen.txt --last 0.05 --threads 2
equal "score: 1 and 2 threads" "$(sed -n 's/^nats\/token  //p' $tmp/out)" "$one"
nats $micro examples/text/austen.txt --last 0.05 --attention expanded
within "score: expanded" "$nats" "$(calc "$one - 2e-5")" "$(calc "$one + 2e-5")"
nats $micro examples/text/austen.txt --last 0.05 --cache BF16
within "score: BF16 cache" "$nats" "$(calc "$one - 0.01")" "$(calc "$one + 0.01")"
nats $micro examples/text/austen.txt --last 0.05 --context 16
within "score: short windows are worse" "$nats" "$(calc "$one + 0.1")" 3
tail -c 500 examples/text/austen.txt > $tmp/part
od -An -v -tu1 $tmp/part > $tmp/ids
nats $micro $tmp/part
one=$nats
nats $micro $tmp/ids --ids
equal "score: text and its ids" "$nats" "$one"
head -c 100000 /dev/zero > $tmp/zeros
nats $micro $tmp/zeros --last 0.5
within "score: zeros are no English" "$nats" 3 100

# ---- route

# loads ARGS...: the tool's table, computed again from its --csv, must be what it prints; so must its map.
loads() {
    good "route $*" route "$@" --csv $tmp/loads.csv
    awk -F, 'NR > 1 { sum[$1] += $3; if (!($1 in most) || $3 > most[$1]) most[$1] = $3
        if (!($1 in least) || $3 < least[$1]) least[$1] = $3; n[$1]++; dead[$1] += $3 == 0
        if ($3 > 0) z[$1] -= $3 * log($3) } END { for (i = 0; i < 100; i++) if (i in n) {
        printf "%d %.4f %.4f %d %.4f\n", i, most[i] * n[i] / sum[i] - 1, least[i] * n[i] / sum[i], dead[i],
        (z[i] / sum[i] + log(sum[i])) / log(n[i]) } }' $tmp/loads.csv > $tmp/b
    awk '/^ *[0-9]+  *[0-9.]+  *[0-9]/ { print $1, $2, $4, $5, $6 }' $tmp/out > $tmp/c
    same "route $*: table" $tmp/b $tmp/c
    awk -F, 'NR > 1 { count[NR] = $3; layer[NR] = $1; sum[$1] += $3; n[$1]++ } END { for (i = 2; i <= NR; i++) {
        s = int(5 * count[i] * n[layer[i]] / sum[layer[i]] + 1e-9)
        printf "%s%s", substr(" .:-=+*#%@", (s > 9 ? 9 : s) + 1, 1), layer[i + 1] == layer[i] ? "" : "\n" } }' \
        $tmp/loads.csv > $tmp/b
    sed -n 's/^ *[0-9]* |\(.*\)|$/\1/p' $tmp/out > $tmp/c
    same "route $*: map" $tmp/b $tmp/c
}
# column N: that of the mean over the layers.
column() { awk -v n="$1" '/^ mean/ { print $n }' $tmp/out; }
tail -c 500 examples/text/austen.txt > $tmp/part
loads $micro $tmp/part
shows "route" '^tokens      500$'
shows "route" '^batches     1 of 500 tokens$'
shows "route" '^experts     8 in each of 2 layers, 2 for a token$'
equal "route: the first line of --csv" "$(head -n 1 $tmp/loads.csv)" "layer,expert,count,share"
equal "route: tokens x K in each layer" "$(awk -F, 'NR > 1 { n[$1] += $3; s[$1] += $4; k[$1]++ }
    END { printf "%d %d %.6f %.6f %d %d", n[1], n[2], s[1], s[2], k[1], k[2] }' $tmp/loads.csv)" \
    "1000 1000 1.000000 1.000000 8 8"
equal "route: one batch" "$(column 2)" "$(column 3)"
equal "route: the mean" "$(column 2)" "$(awk '/^ *[12]  *0/ { s += $2 } END { printf "%.4f", s / 2 }' $tmp/out)"
if LC_ALL=C grep -q "$(printf '[^ -~]')" $tmp/out; then bad "route: more than ASCII in a file"; else ok; fi
cp $tmp/out $tmp/a
run route $micro $tmp/part --threads 2
same "route: 2 threads" $tmp/a $tmp/out
od -An -v -tu1 $tmp/part > $tmp/ids
good "route --ids" route $micro $tmp/ids --ids
same "route: text and its ids" $tmp/a $tmp/out
for options in "--attention absorbed" "--attention expanded" "--cache BF16"; do
    loads $micro $tmp/part $options
    within "route $options" "$(column 2)" 0.05 1
done
# Windows begin afresh: two of 250 tokens are two texts.
loads $micro $tmp/part --context 250
shows "route --context" '^batches     2 of 250 tokens$'
cp $tmp/loads.csv $tmp/both.csv
two=$(column 3)
head -c 250 $tmp/part > $tmp/half
loads $micro $tmp/half
cp $tmp/loads.csv $tmp/first.csv
one=$(column 2)
loads $micro $tmp/part --last 50
within "route: mean over batches" "$two" "$(calc "($one + $(column 2)) / 2 - 0.0001")" \
    "$(calc "($one + $(column 2)) / 2 + 0.0001")"
paste -d, $tmp/first.csv $tmp/loads.csv | awk -F, 'NR > 1 { print $1, $2, $3 + $7 }' > $tmp/d
awk -F, 'NR > 1 { print $1, $2, $3 }' $tmp/both.csv > $tmp/c
same "route: the loads of two windows add up" $tmp/d $tmp/c
loads $micro $tmp/part --context 240
shows "route: left over" '^batches     2 of 240 tokens, 20 tokens left over$'
loads $micro $tmp/byte # one token: two experts, the others dead, one pair
shows "route: one token" '^    1   3.0000   3.0000   0.0000      6   0.3333   [0-7]+[0-7]  *100.00 %   1.00$'
loads $micro $tmp/part --context 1
run route $micro LICENSE --context 600 # longer than the model was made for
equal "route --context 600" "$status $(cat $tmp/err)" \
    "0 dsv3: warning: windows of 600 tokens, longer than the 512 that the model was made for"
# The tokens and the routing of golden.safetensors, of another program; these numbers were computed from that routing.
tail -c 768 examples/models/austen/golden.safetensors | od -An -v -td4 > $tmp/ids
loads examples/models/austen $tmp/ids --ids
for line in '1 0.3750 0.3750 0.5833 0 0.9948 30+31 8.85 % 5.81' '2 0.3333 0.3333 0.7500 0 0.9956 28+29 8.85 % 8.32' \
    '3 0.3750 0.3750 0.5417 0 0.9938 12+15 7.29 % 8.03' '4 0.5000 0.5000 0.5417 0 0.9956 27+28 8.33 % 5.29' \
    'mean 0.3958 0.3958 0.6042 0.0 0.9950 8.33 % 6.86'; do
    equal "route austen: $line" "$(awk -v l="${line%% *}" '$1 == l && /%/ { $1 = $1; print }' $tmp/out)" "$line"
done
refused "route: empty file" "$tmp/nothing: expected at least 1 token, found 0" route $micro $tmp/nothing
refused "route: missing file" "$tmp/none: cannot be opened" route $micro $tmp/none
refused "route: text without a tokenizer" "LICENSE: this model has 128 tokens" route $tmp/v128 LICENSE
copy dense
sed -e 's/"num_hidden_layers": 3/"num_hidden_layers": 1/' \
    -e 's/"num_nextn_predict_layers": 1/"num_nextn_predict_layers": 0/' $micro/config.json > $tmp/dense/config.json
run route $tmp/dense LICENSE # whose other layers are left over
equal "route: no MoE layers" "$status $(grep -c "^dsv3: $tmp/dense: this model has no MoE layers" $tmp/err)" "1 1"

# Files.
well_formed() { # by a parser where there is one
    if command -v xmllint > /dev/null; then check "$1: XML" xmllint --noout "$2"; fi
}
cp $tmp/part "$tmp/a<b>&\"c"
good "route --svg" route $micro "$tmp/a<b>&\"c" --svg $tmp/map.svg
same "route --svg prints the same" $tmp/a $tmp/out
well_formed "route --svg" $tmp/map.svg
equal "route --svg: a cell for each layer and expert" "$(grep -c '<title>layer [12], expert [0-7]: ' $tmp/map.svg)" 16
equal "route --svg: its end" "$(tail -n 1 $tmp/map.svg)" "</svg>"
if grep -q "Load of the experts: $micro on $tmp/a&#60;b&#62;&#38;&#34;c</title>" $tmp/map.svg; then ok; else
    bad "route --svg: title"
fi
good "route --csv" route $micro $tmp/part --csv $tmp/loads.csv
sed -n 's/.*<title>layer \([0-9]*\), expert \([0-9]*\): \([0-9.]*\)<.*/\1 \2 \3/p' $tmp/map.svg > $tmp/b
awk -F, 'NR > 1 { printf "%d %d %.4g\n", $1, $2, $3 * 8 / 1000 }' $tmp/loads.csv > $tmp/c
same "route --svg: the numbers of --csv" $tmp/b $tmp/c
printf 'old' > $tmp/map2.svg
good "route: both files, over an old one" route $micro $tmp/part --svg $tmp/map2.svg --csv $tmp/b
equal "route: over an old file" "$(grep '<title>layer' $tmp/map2.svg)" "$(grep '<title>layer' $tmp/map.svg)"
same "route: both files" $tmp/loads.csv $tmp/b
for option in --svg --csv; do
    refused "route $option: no such directory" "$tmp/none/x: cannot be written" \
        route $micro $tmp/part $option $tmp/none/x
    refused "route $option: directory" "$tmp/empty: cannot be written: is a directory" \
        route $micro $tmp/part $option $tmp/empty
    refused "route $option ''" "$option: expected a path" route $micro $tmp/part $option ""
    refused "route $option: before the work" "cannot be written" route $tmp/none $tmp/none $option $tmp/none/x
    if [ -c /dev/full ]; then
        run route $micro $tmp/part $option /dev/full
        equal "route $option: full device" "$status $(cat $tmp/err)" \
            "1 dsv3: /dev/full: cannot be written: No space left on device"
        if [ -c /dev/full ]; then ok; else bad "route $option: the device is gone"; fi
    fi
    # A file that may not grow to its end: the old one stays, nothing else does.
    printf 'old' > $tmp/kept
    (
        trap '' XFSZ
        ulimit -f 0 && "$tool" route $micro $tmp/part $option $tmp/kept 2>&1 > /dev/null
        echo $?
    ) 2>&1 | cat > $tmp/out
    equal "route $option: no room" "$(tail -n 1 $tmp/out)" 1
    equal "route $option: no room" "$(grep -c "^dsv3: $tmp/kept: cannot be written: " $tmp/out)" 1
    equal "route $option: no room, the old file" "$(cat $tmp/kept)" old
done
refused "route: one path twice" "--csv: expected another path" route $micro $tmp/part --svg $tmp/x --csv $tmp/x
equal "route: nothing is left over" "$(ls $tmp/*.tmp $tmp/x 2> /dev/null)" ""
"$tool" route $micro $tmp/part --csv /dev/stdout 2> $tmp/err | cat > $tmp/out
equal "route: --csv into a pipe" "$(sed -n '/^layer,/,$p' $tmp/out | cmp - $tmp/loads.csv 2>&1)$(cat $tmp/err)" ""
ln -s linked $tmp/link
good "route: --csv through a link" route $micro $tmp/part --csv $tmp/link
same "route: --csv through a link" $tmp/linked $tmp/loads.csv
if [ -L $tmp/link ]; then ok; else bad "route: the link is gone"; fi

# On a terminal in colour, and as wide as that is.
if script -qec true /dev/null < /dev/null > /dev/null 2>&1; then
    escape=$(printf '\033')
    # terminal COMMANDS: as shown, without what the terminal adds.
    terminal() {
        script -qec "stty cols 40; $1 '$tool' route $micro $tmp/part" /dev/null < /dev/null | tr -d '\r' > $tmp/out
    }
    terminal "TERM=xterm"
    equal "route: in colour" "$(grep -c "^ *[12]  $escape\[48;5;" $tmp/out)" 2
    for plain in "TERM=dumb" "TERM=xterm NO_COLOR=1" "env -u TERM"; do
        terminal "$plain"
        sed -n '/^layer/,$p' $tmp/out > $tmp/b
        sed -n '/^layer/,$p' $tmp/a > $tmp/c
        same "route: $plain" $tmp/b $tmp/c
    done
    script -qec "stty cols 25; NO_COLOR=1 '$tool' route examples/models/austen $tmp/part" /dev/null < /dev/null |
        tr -d '\r' > $tmp/out
    shows "route: a narrow terminal" '^each column is the mean of 2 neighbouring experts$'
    equal "route: a narrow terminal" "$(grep -c '^    [1-4] |................|$' $tmp/out)" 4
fi

# ---- plan

# planned NAME FIRST-LINE TOTAL ACTIVE CACHE
planned() {
    good "plan $1" plan "$1"
    equal "plan $1" "$(head -n 1 $tmp/out)" "$1: $2"
    equal "plan $1: main model" "$(awk '/^main model/ { print $4 }' $tmp/out)" "$3"
    equal "plan $1: active" "$(awk '/^active for a token/ { print $5 }' $tmp/out)" "$4"
    equal "plan $1: cache" "$(sed -n 's/^cache per token: \([0-9]*\) bytes BF16.*/\1/p' $tmp/out)" "$5"
    equal "plan $1: groups add up" "$(awk '/^main model/ { exit } NR > 3 { n += $(NF-3); p += $(NF-2); b += $(NF-1) }
        END { printf "%d %.0f %.0f", n, p, b }' $tmp/out)" "$(awk '/^main model/ { print $3, $4, $5 }' $tmp/out)"
}
planned deepseek-v3 "671.03 B parameters, 37.6 B active for a token, weights BF16" 671026419200 37552297472 70272
planned deepseek-v2 "235.74 B parameters, 21.4 B active for a token, weights BF16" 235741434880 21375800320 69120
planned deepseek-v2-lite "15.71 B parameters, 2.7 B active for a token, weights BF16" 15706484224 2661150208 31104
planned moonlight "15.96 B parameters, 2.9 B active for a token, weights BF16" 15960110208 2914776192 31104
planned kimi-k2 "1026.41 B parameters, 32.9 B active for a token, weights BF16" 1026408232448 32861500928 70272
planned micro "0.23 M parameters, 0.2 M active for a token, weights BF16" 232496 158768 240
good "plan austen" plan austen
good "plan --type" plan deepseek-v3 --type F8_E4M3
equal "the published FP8 files" "$(awk '/^main model/ || /^MTP/ { n += $(NF-3); b += $(NF-1) } END { printf "%d %.0f", n, b }' \
    $tmp/out)" "91991 688574839360"
for type in "Q8_0 34" "Q4_0 18"; do # V3: every matrix but the routers' is whole blocks
    good "plan --type $type" plan deepseek-v3 --type ${type% *}
    equal "plan --type $type" "$(awk '/^embedding/ || /^output head/ || /^routed experts/ { b += $(NF-1) } END { printf "%.0f", b }' \
        $tmp/out)" $(((2 * 129280 * 7168 + 58 * 256 * 3 * 7168 * 2048) / 32 * ${type#* }))
    equal "plan --type $type: routers" "$(awk '/^routers/ { print $(NF-1) }' $tmp/out)" $((58 * 256 * (2 * 7168 + 4)))
done
good "plan --type F32" plan deepseek-v3 --type F32
equal "plan --type F32" "$(awk '/^main model/ { print $5 }' $tmp/out)" $((671026419200 * 4))
good "plan preset" plan micro
sed 1d $tmp/out > $tmp/a
for path in $micro $micro/ $micro/config.json; do
    good "plan $path" plan $path
    shows "plan $path" "^$path: 0.23 M parameters"
    sed 1d $tmp/out > $tmp/b
    same "plan $path" $tmp/a $tmp/b
done
good "plan --context" plan deepseek-v3 --context 16384 --batch 2 --rows 1024 --threads 4
shows "plan --context" "^cache BF16, 2 x 16384 positions  *230267[0-9]* "
shows "plan --batch" "^workspace, decode of 2 rows "
shows "plan --rows" "^workspace, prompt chunks of 1024 rows "
large=$(awk '/^workspace, prompt/ { print $(NF-1) }' $tmp/out)
good "plan --rows 1" plan deepseek-v3 --rows 1
within "more rows need more" "$large" "$(awk '/^workspace, prompt/ { print 100 * $(NF-1) }' $tmp/out)" 1e12
good "plan, the most" plan kimi-k2 --context 16777216 --batch 1000000 --rows 1000000 --threads 4096

# ---- inspect

# listed NAME COUNT: one line a tensor, a head and a summary; ranges are ranges.
listed() {
    equal "$1: lines" "$(wc -l < $tmp/out | tr -d ' ')" $(($2 + 2))
    shows "$1: summary" "^$2 tensors, "
    equal "$1: ranges" "$(sed '1d;$d' $tmp/out | awk '$(NF-3) > $(NF-2)' | head -n 3)" ""
}
count=$(awk '/^main model/ || /^MTP/ { n += $(NF-3) } END { print n - 2 }' $tmp/a) # micro has no optional copies
good "inspect micro" inspect $micro
listed "inspect micro" "$count"
equal "inspect: values" "$(tail -n 1 $tmp/out)" "$count tensors, 313752 values, 627552 bytes, 1 file"
equal "inspect: all finite" "$(sed '1d;$d' $tmp/out | awk '$(NF-1) != 0 || $NF != 0')" ""
cp $tmp/out $tmp/a
good "inspect, file" inspect $micro/model.safetensors
same "inspect, file" $tmp/a $tmp/out
good "inspect --check-finite" inspect $micro --check-finite
same "inspect --check-finite" $tmp/a $tmp/out
good "inspect, FP8" inspect tests/golden/v3_fp8 --check-finite
shows "inspect, FP8" ' F8_E4M3 '
equal "inspect, FP8: scales are applied" "$(awk '$2 == "F8_E4M3" && $(NF-2) > 10' $tmp/out)" ""

# Micro in one shard of its own and an index.
mkdir $tmp/sharded
cp $micro/config.json $tmp/sharded
cp $micro/model.safetensors $tmp/sharded/model-00001-of-00002.safetensors
sed '1d;$d' $tmp/a | awk 'BEGIN { printf "{\"weight_map\": {\"extra\": \"model-00002-of-00002.safetensors\"" }
    { printf ", \"%s\": \"model-00001-of-00002.safetensors\"", $1 } END { print "}}" }' \
    > $tmp/sharded/model.safetensors.index.json
# safetensors FILE HEADER DATA: a file from its parts; DATA as printf takes it. The header is shorter than 256 bytes.
safetensors() {
    { printf "\\$(printf %o ${#2})\\0\\0\\0\\0\\0\\0\\0%s" "$2" && printf "$3"; } > "$1"
}
# An entry of the index that nothing needs may lead nowhere; one that is needed is missed by name, with its file.
run generate $tmp/sharded -n 60 --seed 7
equal "missing shard that nothing needs" "$status $(cat $tmp/err)" \
    "0 dsv3: warning: 1 of $((count + 1)) tensors of the index are absent: extra is not in model-00002-of-00002.safetensors"
cp $tmp/out $tmp/b
run inspect $tmp/sharded
equal "inspect: missing shard that nothing needs" "$status $(grep -c 'extra is not in' $tmp/err)" "0 1"
sed 's/"model.norm.weight": "model-00001/"model.norm.weight": "model-00002/' $tmp/sharded/model.safetensors.index.json > $tmp/c
mv $tmp/sharded/model-00001-of-00002.safetensors $tmp/kept.safetensors
everywhere "no shard at all" "is not in model-00001-of-00002.safetensors" $tmp/sharded
mv $tmp/kept.safetensors $tmp/sharded/model-00001-of-00002.safetensors
safetensors $tmp/sharded/model-00002-of-00002.safetensors \
    '{"extra":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' '\0\0\200\077\0\0\0\300'
run inspect $tmp/sharded
equal "inspect, shards" "$status $(cat $tmp/err)" \
    "0 dsv3: warning: $tmp/sharded: 1 tensor is not part of this model, and not used: extra"
listed "inspect, shards" $((count + 1))
shows "inspect, shards" '^extra  *F32  *\[2\]  *-2  *1  *0  *0$'
shows "inspect, shards" ', 2 files$'
text a -n 60 --seed 7
same "generate, missing shard that nothing needs" $tmp/a $tmp/b
run generate $tmp/sharded -n 60 --seed 7
same "generate, shards" $tmp/a $tmp/out

# Values that are not finite, in every type that has them.
safetensors $tmp/bad.safetensors '{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],
"data_offsets":[16,22]},"c":{"dtype":"F16","shape":[1],"data_offsets":[22,24]},"d":{"dtype":"I8","shape":[2],
"data_offsets":[24,26]}}' \
    '\0\0\200\077\0\0\200\277\0\0\300\177\0\0\200\177\0\077\200\177\200\377\0\176\200\177'
good "inspect, not finite" inspect $tmp/bad.safetensors
shows "inspect, F32" '^a  *F32  *\[2, 2\]  *-1  *inf  *1  *1$'
shows "inspect, BF16" '^b  *BF16  *\[3\]  *-inf  *inf  *0  *2$'
shows "inspect, F16" '^c  *F16  *\[1\]  *0  *0  *1  *0$'
shows "inspect, I8" '^d  *I8  *\[2\]  *-128  *127  *0  *0$'
run inspect $tmp/bad.safetensors --check-finite
equal "--check-finite: status" $status 1
equal "--check-finite: the first one" "$(cat $tmp/err)" "dsv3: a: value 2 is not finite"
safetensors $tmp/bad.safetensors '{"w":{"dtype":"F8_E4M3","shape":[1,3],"data_offsets":[0,3]},"w_scale_inv":{"dtype":"F32",
"shape":[1,1],"data_offsets":[3,7]},"x":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[7,9]},"y":{"dtype":"F64","shape":[1],
"data_offsets":[9,17]}}' '\176\070\177\0\0\0\100\174\073\177\177\177\177\177\177\357\177'
good "inspect, FP8" inspect $tmp/bad.safetensors
shows "inspect, E4M3" '^w  *F8_E4M3  *\[1, 3\]  *2  *896  *1  *0$'
shows "inspect, E5M2" '^x  *F8_E5M2  *\[2\]  *0.875  *inf  *0  *1$'
shows "inspect, F64" '^y  *F64  *\[1\]  *[0-9.e+]*30[78]  *[0-9.e+]*30[78]  *0  *0$'
run inspect $tmp/bad.safetensors --check-finite
equal "--check-finite, FP8" "$status $(cat $tmp/err)" "1 dsv3: w: value 2 is not finite"
safetensors $tmp/bad.safetensors '{"e":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}' ''
good "inspect, empty tensor" inspect $tmp/bad.safetensors --check-finite
shows "inspect, empty tensor" '^e  *F32  *\[0, 4\]  *0  *0  *0  *0$'
# A model with NaN in its last tensor, model.norm.weight: opens, and the forward pass says so where it matters.
copy nan
{ head -c $((size - 2)) $micro/model.safetensors && printf '\377\377'; } > $tmp/nan/model.safetensors
run inspect $tmp/nan --check-finite
equal "NaN in a model: status" $status 1
cp $tmp/err $tmp/b
refused "generate: NaN in a model" "is not finite" generate $tmp/nan -n 1
refused "score: NaN in a model" "is not finite" score $tmp/nan LICENSE
refused "route: NaN in a model" "is not finite" route $tmp/nan $tmp/part
cp LICENSE $tmp/read.txt
ln -s read.txt $tmp/read.link
for option in --svg --csv; do
    refused "route $option over the text" "$option: $tmp/read.link: is the text that is read" route $micro $tmp/read.txt $option $tmp/read.link
done
same "route: the text stays" LICENSE $tmp/read.txt

# ---- convert

for option in --help -h; do
    good "convert $option" convert $option
    shows "convert $option" '^usage: dsv3 convert '
done
misused "convert: no operand" "operand is missing: DIR" convert
misused "convert: one operand" "operand is missing: OUT" convert $micro --type F32
misused "convert: three operands" "unexpected argument c" convert a b c
misused "convert: no type" "an option is missing: --type" convert $micro $tmp/converted
misused "convert: unknown option" "unknown option -x" convert $micro $tmp/converted -x
for value in f32 FP8 I32 ''; do
    refused "convert --type '$value'" "--type: expected F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0, found '$value'" \
        convert $micro $tmp/converted --type "$value"
done
refused "convert: missing directory" "$tmp/none/config.json" convert $tmp/none $tmp/converted --type F32
refused "convert: OUT is DIR" "expected another directory" convert $micro $micro --type F32
refused "convert: OUT is DIR by another name" "expected another directory" convert $micro $micro/../micro/ --type F32
mkdir -p $tmp/linked_out
echo mine > $tmp/mine
for file in config.json model.safetensors; do ln -s ../mine $tmp/linked_out/$file; done
run convert $micro $tmp/linked_out --type F32
equal "convert: links in OUT are replaced" "$status $(cat $tmp/mine) $(find $tmp/linked_out -type f | wc -l | tr -d ' ')" "0 mine 2"
refused "convert: OUT is a file" "LICENSE: is not a directory" convert $micro LICENSE --type F32
refused "convert: OUT in nowhere" "$tmp/none/x: cannot be made" convert $micro $tmp/none/x --type F32
if [ -e $tmp/converted ]; then bad "convert: a directory from an error"; else ok; fi

# converted NAME FROM TYPE: $tmp/NAME is FROM in TYPE.
converted() {
    good "convert $1" convert "$2" $tmp/"$1" --type "$3"
    shows "convert $1" "^$tmp/$1: $3, [0-9]* tensors, [0-9]* bytes$"
    good "inspect $1" inspect $tmp/"$1" --check-finite
    cp $tmp/out $tmp/"$1".list
}
# score_of NAME DIR: the score of a short text.
score_of() {
    good "score $1" score "$2" $tmp/part
    sed -n 's/^nats.token *//p' $tmp/out
}
good "inspect micro" inspect $micro
cp $tmp/out $tmp/micro.list
converted wide $micro F32
converted sixteen $micro F16
converted narrow $tmp/wide BF16
converted again $micro BF16
converted fp8 $micro F8_E4M3
converted fp8b $tmp/fp8 F8_E4M3
same "BF16 -> F32 -> BF16" $tmp/micro.list $tmp/narrow.list
same "BF16 -> BF16" $tmp/micro.list $tmp/again.list
same "BF16 -> F32 -> BF16, every byte" $tmp/narrow/model.safetensors $tmp/again/model.safetensors
same "FP8 -> FP8, every byte" $tmp/fp8/model.safetensors $tmp/fp8b/model.safetensors
same "FP8 -> FP8, config.json" $tmp/fp8/config.json $tmp/fp8b/config.json
score_of micro $micro > $tmp/a
for name in wide sixteen narrow; do
    score_of "$name" $tmp/"$name" > $tmp/b
    same "convert $name: score" $tmp/a $tmp/b
done
score_of fp8 $tmp/fp8 > $tmp/b
if paste $tmp/a $tmp/b | awk '{ exit !($2 - $1 < 0.05 && $1 - $2 < 0.05 && $1 != $2) }'; then ok; else
    bad "FP8: score $(cat $tmp/b), of the original $(cat $tmp/a)"
fi
equal "F32: no other type" "$(grep -c ' F32 ' $tmp/wide.list)" "$count"
cp $tmp/fp8.list $tmp/out
shows "FP8: experts" 'experts.0.down_proj.weight  *F8_E4M3 '
shows "FP8: scales" 'experts.0.down_proj.weight_scale_inv  *F32 *\[1, 1\]'
shows "FP8: ragged blocks" 'layers.0.mlp.down_proj.weight_scale_inv  *F32 *\[1, 2\]'
for name in model.embed_tokens.weight lm_head.weight model.norm.weight layers.1.mlp.gate.weight eh_proj.weight; do
    shows "FP8: $name" "$name  *BF16 "
done
shows "FP8: router biases" 'e_score_correction_bias  *F32 '
cp $tmp/fp8/config.json $tmp/out
shows "FP8: config.json" '"weight_block_size": \[128, 128\]'
shows "config.json keeps what it had" '"architectures": \['
cp $tmp/sixteen/config.json $tmp/out
shows "F16: config.json" '"torch_dtype": "float16"'
if grep -q quantization_config $tmp/sixteen/config.json; then bad "F16: quantization_config"; else ok; fi
good "FP8 -> BF16" convert $tmp/fp8 $tmp/b16 --type BF16
if grep -q quantization_config $tmp/b16/config.json; then bad "FP8 -> BF16: quantization_config"; else ok; fi
# blocks TYPE BYTES: micro in blocks of 32 numbers that take BYTES.
blocks() {
    format=$(echo "$1" | tr Q q)
    converted "$format" $micro "$1"
    equal "$1: bytes as planned" "$(sed -n "s/.* \([0-9]*\) bytes, 1 file$/\1/p" $tmp/out)" \
        "$("$tool" plan $micro --type "$1" | awk '/^main model/ || /^MTP modules/ { b += $(NF-1) } END { print b }')"
    equal "$1: values" "$(tail -n 1 $tmp/out | cut -d' ' -f1-4)" "$count tensors, 313752 values,"
    for name in $format micro; do
        sed '1d;$d' $tmp/$name.list | awk '{ match($0, /\[.*\]/); print $1, substr($0, RSTART, RLENGTH) }' > $tmp/$name.shapes
    done
    same "$1: shapes" $tmp/$format.shapes $tmp/micro.shapes
    equal "$1: types" "$(awk '{ print $2 }' $tmp/$format.list | sort -u | tr '\n' ' ')" "BF16 F32 $1 tensors, type "
    shows "$1: ranges" "^model.embed_tokens.weight  *$1 "
    equal "$1: ranges" "$(sed '1d;$d' $tmp/$format.list | awk '$(NF-3) < -9 || $(NF-2) > 9 || $(NF-3) > $(NF-2)')" ""
    for name in model.embed_tokens.weight lm_head.weight eh_proj.weight layers.1.self_attn.o_proj.weight; do
        shows "$1: $name" "$name  *$1 "
    done
    for name in model.norm.weight layers.1.mlp.gate.weight; do shows "$1: $name" "$name  *BF16 "; done
    shows "$1: router biases" 'e_score_correction_bias  *F32 '
    good "$1: as a file" inspect $tmp/$format/model.safetensors
    shows "$1: as a file" "^model.embed_tokens.weight  *U8 "
    cp $tmp/$format/config.json $tmp/out
    shows "$1: config.json" '"quant_method": "blocks"'
    shows "$1: config.json" "\"format\": \"$format\""
    converted ${format}b $tmp/$format "$1"
    same "$1 -> $1, every byte" $tmp/$format/model.safetensors $tmp/${format}b/model.safetensors
    same "$1 -> $1, config.json" $tmp/$format/config.json $tmp/${format}b/config.json
    score_of $format $tmp/$format > $tmp/b
    if paste $tmp/a $tmp/b | awk -v most="$2" '{ exit !($2 - $1 < most && $1 - $2 < most && $1 != $2) }'; then ok; else
        bad "$1: score $(cat $tmp/b), of the original $(cat $tmp/a)"
    fi
    converted ${format}wide $tmp/$format F32 # what the blocks stand for, exactly
    score_of ${format}wide $tmp/${format}wide > $tmp/c
    same "$1 -> F32: score" $tmp/b $tmp/c
    if grep -q quantization_config $tmp/${format}wide/config.json; then bad "$1 -> F32: quantization_config"; else ok; fi
    for type in F16 BF16 F8_E4M3; do converted ${format}to$type $tmp/$format $type; done
    if grep -q '"quant_method": "fp8"' $tmp/${format}toF8_E4M3/config.json; then ok; else bad "$1 -> FP8: config.json"; fi
    good "$1: generate" generate $tmp/$format -n 20 --mtp 1
    good "$1: generate --fast" generate $tmp/$format -n 20 --fast
    good "$1: route" route $tmp/$format $tmp/part --fast
    for mode in "" --fast; do # packing changes no byte
        run generate $tmp/$format -n 60 $mode --no-pack
        cp $tmp/out $tmp/unpacked
        run generate $tmp/$format -n 60 $mode --pack
        same "$1: generate --pack $mode" $tmp/out $tmp/unpacked
    done
    run score $tmp/$format $tmp/part --no-pack
    cp $tmp/out $tmp/unpacked
    run score $tmp/$format $tmp/part --pack
    same "$1: score --pack" $tmp/out $tmp/unpacked
    good "$1: chat" chat $tmp/$format
    good "$1: plan" plan $tmp/$format
}
score_of micro $micro > $tmp/a
blocks Q8_0 0.01
blocks Q4_0 0.2
converted q4_of_q8 $tmp/q8_0 Q4_0
# A config.json that says something else: what it is about, and nothing is read as weights.
mkdir $tmp/blocks
cp $tmp/q8_0/model.safetensors $tmp/blocks
# told SED TEXT: config.json changed by SED is refused with TEXT.
told() {
    sed "$1" $tmp/q8_0/config.json > $tmp/blocks/config.json
    for command in "generate $tmp/blocks -n 1" "score $tmp/blocks $tmp/part" "convert $tmp/blocks $tmp/blocks2 --type F32"; do
        refused "blocks, $1: $command" "$2" $command
    done
}
told 's/"q8_0"/"q4_0"/' "rows of whole Q4_0 blocks, 18 bytes each; found rank 2 and rows of "
told 's/"q8_0"/"q6_k"/' "config.json: format: expected q8_0 or q4_0, found 'q6_k'"
told 's/"block": 32/"block": 16/' "config.json: block: must be 32"
told 's/"block": 32,//' "config.json: block: is missing"
told 's/"format": "q8_0",//' "config.json: format: is missing"
told 's/"blocks"/"gguf"/' "config.json: quant_method: expected fp8 or blocks, found 'gguf'"
told 's/"blocks"/"fp8"/' "is U8, but config.json has no quantization_config of blocks"
told 's/quantization_config/other_config/' "is U8, but config.json has no quantization_config of blocks"
good "inspect: nobody says blocks" inspect $tmp/blocks
shows "inspect: nobody says blocks" "^model.embed_tokens.weight  *U8 "
sed 's/"q8_0"/"q6_k"/' $tmp/q8_0/config.json > $tmp/blocks/config.json
run inspect $tmp/blocks
equal "inspect: unknown blocks" "$status $(grep -c 'warning: .*format: expected q8_0' $tmp/err)" "0 1"
rm $tmp/blocks/config.json
good "inspect: no config.json" inspect $tmp/blocks
# A scale that is NaN makes 32 of them: inspect counts, the forward pass refuses.
cp $tmp/q8_0/config.json $tmp/blocks
length=$(wc -c < $tmp/blocks/model.safetensors)
{ head -c $((length - 34)) $tmp/blocks/model.safetensors && printf '\1\176' && tail -c 32 $tmp/blocks/model.safetensors; } \
    > $tmp/blocks/m && mv $tmp/blocks/m $tmp/blocks/model.safetensors
run inspect $tmp/blocks --check-finite
equal "inspect: NaN in a block" "$status $(awk '$(NF-1) == 32' $tmp/out | wc -l | tr -d ' ')" "1 1"
good "convert: NaN in a block, as F32" convert $tmp/blocks $tmp/blocks2 --type F32
refused "convert: NaN in a block, as Q4_0" "has a value that Q4_0 cannot hold" convert $tmp/blocks $tmp/blocks3 --type Q4_0
copy nan # with NaN in the middle of the file, where the experts are
{ head -c $((size / 2)) $micro/model.safetensors && printf '\377\177' && tail -c +$((size / 2 + 3)) $micro/model.safetensors; } \
    > $tmp/nan/model.safetensors
refused "convert: NaN as Q8_0" "has a value that Q8_0 cannot hold" convert $tmp/nan $tmp/fp8nan --type Q8_0
refused "convert: NaN as FP8" "has a value that F8_E4M3 cannot hold" convert $tmp/nan $tmp/fp8nan --type F8_E4M3
good "convert: NaN as F32" convert $tmp/nan $tmp/widenan --type F32
(
    trap '' XFSZ
    ulimit -f 100 # blocks of 512 bytes: less than a checkpoint
    "$tool" convert $micro $tmp/full --type F32 > /dev/null 2> $tmp/err
)
equal "convert: no room: status" $? 1
if grep -q "$tmp/full/.*model.safetensors: cannot write" $tmp/err; then ok; else fail "convert: no room"; fi
equal "convert: no room: nothing is left" "$(ls $tmp/full)" ""

# ---- train

head -c 20000 examples/text/austen.txt > $tmp/train.txt
recipe="--preset micro --text $tmp/train.txt --seq 12 --batch 4 --val-every 4 --val-tokens 48 --threads 1"
# trains NAME ARGS...: status 0 and nothing on stdout.
trains() {
    name=$1
    shift
    run train "$@"
    if [ $status = 0 ] && [ ! -s $tmp/out ]; then ok; else fail "train, $name: status $status"; fi
}
for option in --help -h; do
    good "train $option" train $option
    shows "train $option" '^usage: dsv3 train '
done
misused "train: an operand" "unexpected argument a" train a
misused "train: unknown option" "unknown option --frobnicate" train --frobnicate
misused "train: no options" "--out: expected a directory" train
misused "train: no model" "expected one of --preset, --config and --init, found 0" train --out $tmp/t --text LICENSE
misused "train: two models" "found 2" train --out $tmp/t --text LICENSE --preset micro --init $micro
misused "train: no text" "--text: expected at least one file" train --out $tmp/t --preset micro
refused "train: empty --text" "--text: expected a value, found ''" train --out $tmp/t --preset micro --text ''
for option in --steps --epochs --batch --accum --seq --save-every --val-every --val-tokens --threads; do
    misused "train $option without a value" "missing behind $option" train $option
    for value in 0 -1 1.5 nan abc ''; do
        refused "train $option '$value'" "$option: expected" train $recipe --out $tmp/t $option "$value"
    done
done
for option in --warmup --seed --sample-every; do
    for value in -1 1.5 nan abc ''; do
        refused "train $option '$value'" "$option: expected" train $recipe --out $tmp/t $option "$value"
    done
done
for option in --lr --constant --low --tail --lambda --alpha --bias-speed --bias-freeze --weight-decay --clip --ema --std --val; do
    misused "train $option without a value" "missing behind $option" train $option
    for value in -1 1e31 nan inf abc ''; do
        refused "train $option '$value'" "$option: expected" train $recipe --out $tmp/t $option "$value"
    done
done
refused "train --val 100" "--val: expected 0 to 99, found 100" train $recipe --out $tmp/t --val 100
refused "train --ema 1" "--ema: expected 0 to 0.999999999, found 1" train $recipe --out $tmp/t --ema 1
refused "train --schedule" "--schedule: expected v3 or cosine, found 'linear'" train $recipe --out $tmp/t --schedule linear
for value in some norms, ,up norms,,up upp u NORMS "norms up" ''; do
    refused "train --keep '$value'" "--keep: expected none, all, or norms, up, swiglu with commas between, found '$value'" \
        train $recipe --out $tmp/t --keep "$value"
done
refused "train --type" "--type: expected F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0, found 'FP8'" train $recipe --out $tmp/t --type FP8
refused "train --accum 3" "--accum: expected a divisor of the batch of 4" train $recipe --out $tmp/t --accum 3
refused "train --batch" "--batch: expected at most 16777216 tokens in a micro-batch (--accum), found 1000000 x 500" \
    train --preset micro --text $tmp/train.txt --out $tmp/t --batch 1000000 --accum 1 --seq 500
refused "train --warmup" "--warmup: expected at most 8" train $recipe --out $tmp/t --warmup 9 --steps 8
for option in --freeze --exempt; do
    refused "train $option" "$option: no tensor has a name like 'layers.*'" train $recipe --out $tmp/t $option 'layers.*'
done
refused "train --preset" "--preset: expected one of deepseek-v3," train --preset nano --text LICENSE --out $tmp/t
refused "train --config" "$tmp/none" train --config $tmp/none --text LICENSE --out $tmp/t
refused "train --init" "$tmp/none" train --init $tmp/none --text LICENSE --out $tmp/t
refused "train: missing text" "$tmp/none: cannot be opened" train $recipe --text $tmp/none --out $tmp/t
refused "train: short text" "--text: expected at least 513 tokens before the part for validation, found 1" \
    train --preset micro --text $tmp/two --out $tmp/t
refused "train: no tokenizer" "use --ids" train --preset moonlight --text LICENSE --out $tmp/t
refused "train: more memory than there is" "no memory for" train --preset deepseek-v3 --ids --text $tmp/list --seq 1 --out $tmp/t
if [ -e $tmp/t ]; then bad "train: a directory from an error"; else ok; fi
refused "train: OUT is a file" "LICENSE: is not a directory" train $recipe --out LICENSE
refused "train: OUT in nowhere" "$tmp/none/x: cannot be made" train $recipe --out $tmp/none/x
refused "train: OUT holds a checkpoint" "$tmp/wide: holds a checkpoint already" train $recipe --out $tmp/wide
refused "train: nothing to resume" "train.safetensors: does not exist" train --resume --out $tmp/wide
mkdir $tmp/locked
chmod 500 $tmp/locked
[ -w $tmp/locked ] || refused "train: read-only directory" "$tmp/locked/dsv3.lock: cannot be written" train $recipe --out $tmp/locked
chmod 700 $tmp/locked
if [ -c /dev/full ]; then
    mkdir $tmp/full2
    ln -s /dev/full $tmp/full2/log.csv
    refused "train: full disk" "log.csv: cannot be written" train $recipe --out $tmp/full2
fi

# One whole run, and what it leaves behind.
trains "a run" $recipe --out $tmp/whole --steps 12 --save-every 5
equal "train: rows" "$(wc -l < $tmp/whole/log.csv | tr -d ' ')" 13
equal "train: columns" "$(head -n 1 $tmp/whole/log.csv)" \
    "step,tokens,lr,loss,main,mtp1,balance,grad_norm,maxvio,val_main,val_mtp1"
equal "train: each row has them" "$(awk -F, 'NF != 11' $tmp/whole/log.csv)" ""
equal "train: validations" "$(awk -F, '$10 != "" { printf "%s ", $1 }' $tmp/whole/log.csv)" "step 4 8 12 "
if awk -F, 'NR == 2 { a = $5 } END { exit !($5 < a - 0.5 && $2 == 576) }' $tmp/whole/log.csv; then ok; else
    bad "train: it does not learn"
fi
for name in loss lr grad_norm maxvio load bias; do
    file=$tmp/whole/$name.svg
    if [ "$(head -c 4 $file)" = "<svg" ] && [ "$(tail -n 1 $file)" = "</svg>" ] && ! grep -qi nan $file; then ok; else
        bad "train: $name.svg"
    fi
done
cp $tmp/whole/loss.svg $tmp/out
shows "train: loss.svg" '>validation, MTP 1<'
good "generate from it" generate $tmp/whole -n 5 --mtp 1
good "score it" score $tmp/whole $tmp/train.txt --last 5 --context 12
good "plan it" plan $tmp/whole
good "route it" route $tmp/whole $tmp/part
good "inspect it" inspect $tmp/whole --check-finite
good "inspect its state" inspect $tmp/whole/train.safetensors --check-finite
shows "inspect its state" '^m.model.norm.weight  *F32 *\[64\]'
shows "inspect its state" '^loads  *U64 *\[4, 8\]'
refused "train: not again" "holds a checkpoint already" train $recipe --out $tmp/whole

# To another end: as one run of so many steps while the rate is constant; behind its phases with the last rate.
trains "a run to be extended" $recipe --out $tmp/longer --steps 12 --constant 0.7 --lr 0.004
run train --resume --out $tmp/longer
if [ $status = 0 ] && grep -q "the run in $tmp/longer is complete: step 12 of 12; --steps" $tmp/err; then ok; else
    fail "train --resume: a finished run says so"
fi
trains "--resume --steps: a finished run" --resume --out $tmp/longer --steps 15
if grep -q 'the run of 12 steps goes on to step 15; its phases are those of 12 steps' $tmp/err; then ok; else
    fail "train --resume --steps: no line about it"
fi
equal "train --resume --steps: the last rate" "$(awk -F, 'NR > 13 { printf "%s %.6f, ", $1, $3 }' $tmp/longer/log.csv)" \
    "13 0.000133, 14 0.000133, 15 0.000133, "
trains "--resume --steps: once more" --resume --out $tmp/longer --steps 16
equal "train --resume --steps: rows" "$(wc -l < $tmp/longer/log.csv | tr -d ' ')" 17
refused "train --resume --steps: fewer than are done" "--steps: expected at least 16, the steps done, found 15" \
    train --resume --out $tmp/longer --steps 15
trains "a run to be stretched" $recipe --out $tmp/stretched --steps 4 --warmup 1 --constant 1 --bias-freeze 1
trains "--resume --steps: before the rate falls" --resume --out $tmp/stretched --steps 12 --val-every 4
trains "the same in one" $recipe --out $tmp/straight --steps 12 --warmup 1 --constant 1 --bias-freeze 1 --val-every 4
same "train --resume --steps: log.csv" $tmp/straight/log.csv $tmp/stretched/log.csv
same "train --resume --steps: weights" $tmp/straight/model.safetensors $tmp/stretched/model.safetensors

# --init: the defaults are for a model that knows something.
trains "--init" --init $micro --text $tmp/train.txt --seq 24 --batch 2 --steps 6 --out $tmp/tuned --val-every 6
equal "train --init: rates" "$(awk -F, 'NR > 1 && NR < 5 { printf "%.6f ", $3 }' $tmp/tuned/log.csv)" "0.000033 0.000067 0.000100 "
trains "--init --lr --warmup" --init $micro --text $tmp/train.txt --seq 24 --batch 2 --steps 2 --out $tmp/tuned2 --lr 0.001 --warmup 0
equal "train --init --lr: rates" "$(awk -F, 'NR == 2 { print $3 }' $tmp/tuned2/log.csv)" "0.001"

# The same numbers, whatever the threads, and whatever is kept.
trains "two threads" $recipe --out $tmp/threads --steps 12 --save-every 5 --threads 2
for file in model.safetensors train.safetensors log.csv config.json; do
    same "train: two threads" $tmp/whole/$file $tmp/threads/$file
done
trains "--keep all" $recipe --out $tmp/keepall --steps 12 --keep all --type BF16
same "train --keep" $tmp/whole/log.csv $tmp/keepall/log.csv
trains "--keep norms,swiglu" $recipe --out $tmp/keepsome --steps 12 --keep norms,swiglu
same "train --keep norms,swiglu" $tmp/whole/log.csv $tmp/keepsome/log.csv
trains "--accum 4" $recipe --out $tmp/accum --steps 12 --accum 4
if paste -d, $tmp/whole/log.csv $tmp/accum/log.csv |
    awk -F, 'NR > 1 { d = $4 - $15; if (d > 1e-3 || d < -1e-3) bad = 1 } END { exit bad }'; then ok; else
    bad "train --accum: other losses"
fi
trains "--seed 2" $recipe --out $tmp/seed --steps 1 --seed 2
differ "train --seed" $tmp/whole/model.safetensors $tmp/seed/model.safetensors
converted narrower $tmp/whole BF16
same "train --type BF16 is convert's" $tmp/narrower/model.safetensors $tmp/keepall/model.safetensors

# A run that is interrupted, or killed, at any moment, goes on as if nothing had happened.
whole() {
    for file in model.safetensors train.safetensors log.csv config.json; do
        same "train: $1" $tmp/whole/$file $tmp/"$2"/$file
    done
}
"$tool" train $recipe --out $tmp/stopped --steps 12 --save-every 5 > $tmp/out 2> $tmp/err &
child=$!
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -f $tmp/stopped/log.csv ] && [ "$(wc -l < $tmp/stopped/log.csv)" -gt 1 ] && break
    sleep 0.05
done
kill -INT $child 2> /dev/null
wait $child
equal "train: Ctrl-C: status" $? 0
trains "after Ctrl-C" --resume --out $tmp/stopped
whole "after Ctrl-C" stopped
trains "a complete run" --resume --out $tmp/stopped --threads 1
whole "a complete run, resumed" stopped
refused "train --resume: another option" "--lr: expected '0.003', as the run in $tmp/stopped has it" \
    train --resume --out $tmp/stopped --lr 0.004
for pair in "--val 50 5" "--lr 5e-5 0.003" "--clip 1e30 1" "--ema 0.0005 0" "--weight-decay 12345 0.1"; do # as one types them
    set -- $pair
    refused "train --resume $1 $2" "$1: expected '$3', as the run in $tmp/stopped has it, found '$2'" \
        train --resume --out $tmp/stopped $1 $2
done
refused "train --resume: another text" "--text: expected the text of the run" train --resume --out $tmp/stopped --text LICENSE
# A text by a relative path, and another folder.
mkdir -p $tmp/here/there
head -c 3000 $tmp/train.txt > $tmp/here/text
case $tool in /*) from=$tool ;; *) from=$PWD/$tool ;; esac
(cd $tmp/here && "$from" train --preset micro --seq 12 --threads 1 --steps 1 --text text --val-text text --out run) > $tmp/out 2>&1
(cd $tmp/here/there && "$from" train --resume --steps 2 --out ../run) > $tmp/out 2> $tmp/err
equal "train --resume: a relative text" "$? $(cat $tmp/err)" "1 dsv3: text: cannot be opened: No such file or directory; \
it is --text of the run: if it is elsewhere now, --resume --text PATH says where"
(cd $tmp/here/there && "$from" train --resume --steps 2 --out ../run --text ../text) > $tmp/out 2> $tmp/err
equal "train --resume: a relative --val-text" "$? $(grep -c -e '; it is --val-text of the run: .* --resume --val-text PATH' $tmp/err)" "1 1"
(cd $tmp/here/there && "$from" train --resume --steps 2 --out ../run --text ../text --val-text ../text) > $tmp/out 2> $tmp/err
equal "train --resume: a relative text, given" $? 0
(cd $tmp/here/there && "$from" train --resume --steps 2 --out ../run --text none) > $tmp/out 2> $tmp/err
equal "train --resume: a text that is given" "$(cat $tmp/err)" "dsv3: none: cannot be opened: No such file or directory"
misused "train --resume: a model" "--resume: the model is the one in" train --resume --out $tmp/stopped --preset micro
# The reader behind a pipe ends, as tee does by Ctrl-C: so does the run, with everything saved.
rm -rf $tmp/stopped
{
    "$tool" train $recipe --out $tmp/stopped --steps 12 --save-every 5
    echo $? > $tmp/status
} 2>&1 | head -n 1 > $tmp/out
equal "train: a closed pipe: status" "$(cat $tmp/status)" 0
trains "after a closed pipe" --resume --out $tmp/stopped
whole "after a closed pipe" stopped
moment=0
for pause in 0 0.02 0.05 0.1 0.15; do
    moment=$((moment + 1))
    rm -rf $tmp/killed
    "$tool" train $recipe --out $tmp/killed --steps 12 --save-every 1 --type F32 > $tmp/out 2> $tmp/err &
    child=$!
    while kill -0 $child 2> /dev/null && [ ! -f $tmp/killed/model.safetensors ]; do sleep 0.01; done
    sleep $pause
    kill -9 $child 2> /dev/null
    wait $child 2> /dev/null
    good "kill -9, moment $moment: a checkpoint is there" inspect $tmp/killed --check-finite
    good "kill -9, moment $moment: it opens" generate $tmp/killed -n 1
    trains "kill -9, moment $moment" --resume --out $tmp/killed --save-every 5
    whole "kill -9, moment $moment" killed
done
head -c 3000 $tmp/whole/train.safetensors > $tmp/killed/train.safetensors
refused "train --resume: a damaged state" "$tmp/killed/train.safetensors" train --resume --out $tmp/killed
cp $micro/model.safetensors $tmp/killed/train.safetensors
refused "train --resume: another file" "is no state of a training run" train --resume --out $tmp/killed
# The disk fills up later: what was saved before stays.
trains "before the disk is full" $recipe --out $tmp/late --steps 12 --save-every 100
cp $tmp/late/train.safetensors $tmp/a
(
    trap '' XFSZ
    ulimit -f 2000
    "$tool" train --resume --out $tmp/late > /dev/null 2> $tmp/err
)
equal "train: no room: status" $? 1
if grep -q "train.safetensors: cannot write" $tmp/err; then ok; else fail "train: no room"; fi
same "train: no room: the old state stays" $tmp/a $tmp/late/train.safetensors
good "train: no room: the old checkpoint stays" inspect $tmp/late --check-finite

# On a terminal: one line that is rewritten and fits, with the time left at its end; all else on lines of its own.
if script --version 2> /dev/null | grep -q util-linux; then
    TERM=xterm script -qec "stty cols 60; '$tool' train $recipe --steps 40 --sample-every 7 --out $tmp/terminal" /dev/null \
        < /dev/null | tr -d '\n' | tr '\r' '\n' | grep -v validation > $tmp/out
    shows "train: terminal: a line" '^step [0-9]*/40  loss [0-9.]* [0-9.]*  .*[0-9] tokens/s  0:00:0[0-9] left *$'
    equal "train: terminal: lines that are too long" "$(awk 'length > 60 && !/^sample/' $tmp/out)" ""
    equal "train: terminal: samples" "$(grep -c '^sample at step ' $tmp/out)" 5
fi

# Other beginnings, settings and ends.
good "score micro" score $micro $tmp/train.txt --context 12
before=$(sed -n 's/^nats.token *//p' $tmp/out)
trains "--init" --init $micro --text $tmp/train.txt --seq 12 --batch 32 --steps 1 --lr 0 --out $tmp/init --threads 1
if awk -F, -v a="$before" 'END { exit !($5 - a < 0.15 && a - $5 < 0.15) }' $tmp/init/log.csv; then ok; else
    bad "train --init: loss $(tail -n 1 $tmp/init/log.csv), score $before"
fi
converted initial $tmp/init BF16
same "train --init, rate 0: the weights stay" $tmp/micro.list $tmp/initial.list
trains "--freeze" $recipe --out $tmp/frozen --steps 2 --freeze '*shared_experts*' --exempt '*embed_tokens*' --ema 0.9 \
    --type F8_E4M3 --schedule cosine --sample-every 2 --warmup 0 --bias-freeze 0
if grep -q 'warning: --freeze: 9 tensors of shared experts' $tmp/err; then ok; else fail "train --freeze: no warning"; fi
if grep -q '^sample at step 2: ' $tmp/err; then ok; else fail "train --sample-every: no sample"; fi
good "train --ema: a checkpoint" score $tmp/frozen/ema $tmp/part
good "train --type F8_E4M3" score $tmp/frozen $tmp/part
good "train --bias-freeze 0" inspect $tmp/frozen/train.safetensors
shows "train --bias-freeze 0" '^weights.model.layers.1.mlp.gate.e_score_correction_bias  *F32 *\[8\] *0  *0 '
trains "--resume with --ema" --resume --out $tmp/frozen
trains "--config, --ids, two texts" --config $tmp/v128 --ids --text $tmp/list --text $tmp/list --val 0 --seq 4 --steps 2 \
    --batch 2 --out $tmp/ids2 --threads 1
good "score --ids of it" score $tmp/ids2 $tmp/list --ids
trains "a validation too short for the module" $recipe --steps 1 --val 0.01 --out $tmp/short
if grep -q '  validation [0-9.]* -  norm' $tmp/err; then ok; else fail "train: what is not measured is a dash"; fi
trains "--freeze: a bias" $recipe --steps 2 --freeze '*layers.1.mlp.gate.*' --out $tmp/steady --type F32
good "train --freeze: a bias" inspect $tmp/steady
shows "train --freeze: a bias" '^model.layers.1.mlp.gate.e_score_correction_bias  *F32 *\[8\] *0  *0 '
if grep -q '^model.layers.2.mlp.gate.e_score_correction_bias  *F32 *\[8\] *0  *0 ' $tmp/out; then
    bad "train --freeze: a bias: others, too"
else
    ok
fi
run train $recipe --lr 1e30 --clip 0 --steps 40 --out $tmp/diverged --save-every 20
equal "train: diverged: status" $status 1
if grep -q 'the training has diverged: they are not saved' $tmp/err; then ok; else fail "train: diverged"; fi
good "train: diverged: the first checkpoint stays" inspect $tmp/diverged --check-finite
equal "train: diverged: skipped steps in the log" "$(awk -F, '$8 == ""' $tmp/diverged/log.csv | wc -l | tr -d ' ')" 10

# Very short schedules: no phase of length 0 takes the place of the constant one.
rates() { awk -F, 'NR > 1 { printf "%s ", $3 }' $tmp/"$1"/log.csv; }
for n in 1 2 3; do
    trains "--steps $n" $recipe --steps $n --out $tmp/steps$n
    equal "train --steps $n: rates" "$(rates steps$n)" "$(printf '0.003 %.0s' $(seq $n))"
    trains "--steps $n, cosine" $recipe --steps $n --schedule cosine --warmup 0 --out $tmp/cosine$n
    equal "train --steps $n, cosine: the first rate" "$(awk -F, 'NR == 2 { print $3 }' $tmp/cosine$n/log.csv)" 0.003
    trains "--init --steps $n" --init $micro --text $tmp/train.txt --seq 12 --batch 1 --threads 1 --steps $n --out $tmp/few$n
    equal "train --init --steps $n: the last rate" "$(awk -F, 'END { print $3 }' $tmp/few$n/log.csv)" 0.0001
done

# Whatever ends a run saves the last good state. At this rate training ends with steps that change nothing: the first of
# them is found, then a run ends there.
state() { head -c 40000 $tmp/"$1"/train.safetensors | grep -ao "\"$2\":\"[^\"]*\"" | head -n 1 | cut -d '"' -f 4; }
for rate in 50 100 20 200 10 1000; do # which of them is wild enough, and not at once, depends on roundings
    wild="$recipe --lr $rate --clip 0 --save-every 1000 --constant 1 --warmup 0 --bias-freeze 1"
    rm -rf $tmp/run_wild
    run train $wild --steps 60 --out $tmp/run_wild
    end=$(awk -F, 'NR > 1 && $8 != "" { last = $1 } END { print last - 1 }' $tmp/run_wild/log.csv)
    [ $status = 1 ] && [ "$end" -ge 2 ] && break
done
equal "train: it diverges" "$status $((end >= 2))" "1 1"
first=$(awk -F, 'NR > 1 && $8 == "" { print $1; exit }' $tmp/run_wild/log.csv)
run train $wild --steps "$first" --out $tmp/run_last
equal "train: the last step is skipped: status" $status 0
if grep -q "warning: the last 1 steps changed nothing: the model is that of step $((first - 1))" $tmp/err; then ok; else
    fail "train: the last step is skipped: no warning"
fi
equal "train: the last step is skipped: saved" "$(state run_last step) $(state run_last trained)" "$first $((first - 1))"
good "train: the last step is skipped: the checkpoint" inspect $tmp/run_last --check-finite
differ "train: the last step is skipped: it was trained" $tmp/run_wild/config.json $tmp/run_last/model.safetensors
run train --resume --out $tmp/run_last
equal "train: the last step is skipped: --resume" "$status $(grep -c 'is complete' $tmp/err)" "0 1"
# One that has diverged ends with what led to finite gradients, made once more.
equal "train: diverged: the last good state" "$(state run_wild step)" "$end"
run train $wild --steps "$end" --out $tmp/run_tame
same "train: diverged: its weights" $tmp/run_tame/model.safetensors $tmp/run_wild/model.safetensors
run train --resume --out $tmp/run_wild
equal "train: diverged: --resume goes the same way" "$status $(state run_wild step)" "1 $end"

# log.csv as a spreadsheet or a person leaves it: no row is lost, and what is no row is told.
trains "a log" $recipe --steps 6 --out $tmp/run_log
trains "its whole" $recipe --steps 9 --constant 1 --warmup 0 --out $tmp/log9
cp $tmp/run_log/log.csv $tmp/log.csv
logged() { awk -F, 'NR > 1 { printf "%s ", $1 }' $tmp/run_log/log.csv; }
sed 's/$/\r/' $tmp/log.csv > $tmp/run_log/log.csv
good_steps=6
relog() { # NAME WARNINGS ROWS
    good_steps=$((good_steps + 1))
    trains "$1" --resume --out $tmp/run_log --steps $good_steps
    equal "$1: warnings" "$(grep -c 'log.csv: line' $tmp/err)" "$2"
    equal "$1: rows" "$(logged)" "$3"
}
relog "log.csv with CR LF" 0 "1 2 3 4 5 6 7 "
head -n 7 $tmp/run_log/log.csv > $tmp/a
same "log.csv with CR LF: the rows stay" $tmp/log.csv $tmp/a
sed '3s/,.*/,edited/' $tmp/run_log/log.csv > $tmp/a && mv $tmp/a $tmp/run_log/log.csv
relog "log.csv with an edited line" 1 "1 2 3 4 5 6 7 8 "
if grep -q 'log.csv: line 3 is no row of this run; it stays' $tmp/err; then ok; else fail "log.csv: which line"; fi
equal "log.csv: the edited line stays" "$(sed -n 3p $tmp/run_log/log.csv)" "2,edited"
{ printf '\357\273\277' && cat $tmp/run_log/log.csv; } > $tmp/log.bom && mv $tmp/log.bom $tmp/run_log/log.csv # a byte order mark
relog "log.csv with a mark in front" 1 "1 2 3 4 5 6 7 8 9 "
printf '10,480,0.00' >> $tmp/run_log/log.csv # torn: that step comes again
relog "log.csv with a torn end" 1 "1 2 3 4 5 6 7 8 9 10 "
sed 1d $tmp/run_log/log.csv > $tmp/a && mv $tmp/a $tmp/run_log/log.csv
relog "log.csv without a header" 1 "1 2 3 4 5 6 7 8 9 10 11 "
# Notes, whatever they begin with; one with a zero byte in it, and one without its end. Rows behind the state go.
rm -rf $tmp/run_log
trains "a log, again" $recipe --steps 6 --out $tmp/run_log
{
    sed 's/^3,/2026-11-30: 99 problems\n3,/' $tmp/run_log/log.csv && sed -n '7s/^6,/7,/p' $tmp/run_log/log.csv
    printf '88,edited\n7,\0001\n2026-12-01: the end'
} > $tmp/a && cp $tmp/a $tmp/run_log/log.csv
good_steps=6
relog "log.csv with notes" 1 "1 2 2026-11-30: 99 problems 3 4 5 6 88 7 2026-12-01: the end 7 "
grep -av '^7,[0-9]' $tmp/a | tail -n +2 > $tmp/b
grep -av '^7,[0-9]' $tmp/run_log/log.csv | tail -n +2 > $tmp/c
same "log.csv with notes: they stay, to the byte" $tmp/b $tmp/c
printf '8,480,0.003\0\0\0' >> $tmp/run_log/log.csv # torn, as a machine without power leaves it
relog "log.csv with zeros at its end" 1 "1 2 2026-11-30: 99 problems 3 4 5 6 88 7 2026-12-01: the end 7 8 "

# The backend is of the run, too.
trains "a run with another backend" $recipe --steps 4 --backend reference --out $tmp/run_plain
trains "half of it" $recipe --steps 2 --backend reference --out $tmp/run_half --constant 1 --bias-freeze 1 --warmup 0
trains "the whole of it" $recipe --steps 4 --backend reference --out $tmp/run_both --constant 1 --bias-freeze 1 --warmup 0
equal "train: its backend" "$(state run_half backend)" reference
trains "the other half" --resume --out $tmp/run_half --steps 4
equal "train --resume: no word about the backend" "$(grep -c 'warning' $tmp/err)" 0
same "train --resume: the backend of the run" $tmp/run_half/model.safetensors $tmp/run_both/model.safetensors
equal "train --resume: its backend" "$(state run_half backend)" reference
run train --resume --out $tmp/run_half --steps 5 --backend auto
if [ "$(state run_half backend)" = reference ] ||
    grep -q "warning: --backend: the run was made with reference and goes on with $(state run_half backend), whose" $tmp/err
then ok; else fail "train --resume: another backend is told"; fi

# The balance loss is the config's, and what was used is written back.
sed 's/"aux_loss_alpha": *[0-9.e-]*/"aux_loss_alpha": 0.5/' $tmp/steps1/config.json > $tmp/alpha.json
trains "--config with another alpha" --config $tmp/alpha.json --text $tmp/train.txt --seq 12 --batch 4 --threads 1 --steps 1 --out $tmp/alpha1
equal "train: aux_loss_alpha is read" "$(state alpha1 --alpha)" 0.5
differ "train: aux_loss_alpha is used" $tmp/steps1/model.safetensors $tmp/alpha1/model.safetensors
trains "--alpha" $recipe --steps 1 --alpha 0.25 --out $tmp/alpha2
equal "train --alpha: written back" "$(grep -c '"aux_loss_alpha": 0.25,' $tmp/alpha2/config.json)" 1
trains "seq_aux" --config $tmp/alpha.json --text $tmp/train.txt --seq 12 --batch 4 --threads 1 --steps 1 --out $tmp/alpha3 --alpha 0.001
same "train --alpha over the config's" $tmp/alpha3/model.safetensors $tmp/steps1/model.safetensors
sed 's/"seq_aux": true/"seq_aux": false/' $tmp/alpha.json > $tmp/seq.json
run train --config $tmp/seq.json --text $tmp/train.txt --seq 12 --batch 4 --threads 1 --steps 1 --out $tmp/alpha4
equal "train: seq_aux false" "$status $(grep -c warning $tmp/err)" "0 0"
equal "train: seq_aux as used" "$(grep -c '"seq_aux": false' $tmp/alpha4/config.json)" 1
differ "train: seq_aux false: the loss of the batch" $tmp/alpha4/model.safetensors $tmp/alpha1/model.safetensors
for name in alpha seq; do # a micro-batch that is one sequence
    trains "$name, one by one" --config $tmp/$name.json --text $tmp/train.txt --seq 12 --batch 4 --accum 4 --threads 1 --steps 1 --out $tmp/one_$name
done
same "train: seq_aux false: of micro-batches" $tmp/one_alpha/model.safetensors $tmp/one_seq/model.safetensors
sed 's/"aux_loss_alpha": *[0-9.e-]*/"aux_loss_alpha": -0.5/' $tmp/steps1/config.json > $tmp/minus.json
refused "train: aux_loss_alpha below 0" "aux_loss_alpha: expected 0 to 1000000, found -0.5" \
    train --config $tmp/minus.json --text $tmp/train.txt --seq 12 --out $tmp/t
v2small="--config tests/golden/v2 --ids --text $tmp/v2ids --seq 8 --batch 2 --threads 1 --steps 1"
awk 'BEGIN { for (i = 0; i < 400; i++) printf "%d ", i * i % 31 }' > $tmp/v2ids
trains "V2" $v2small --out $tmp/v2a
equal "train, V2: the loss counts the routing" "$(state v2a --alpha-loads)" routing
trains "V2's losses" $v2small --out $tmp/v2b --alpha-device 0.5 --alpha-comm 0.25
equal "train, V2: no warning" "$(grep -c warning $tmp/err)" 0
equal "train: V2's losses in the log" "$(head -n 1 $tmp/v2b/log.csv)" \
    "step,tokens,lr,loss,main,balance,grad_norm,maxvio,val_main,device,communication"
equal "train: V2's losses: no others" "$(head -n 1 $tmp/v2a/log.csv)" "step,tokens,lr,loss,main,balance,grad_norm,maxvio,val_main"
if awk -F, -v alpha="$(state v2b --alpha)" 'NR == 2 { d = $4 - $5 - alpha * $6 - 0.5 * $10 - 0.25 * $11
    good = d < 1e-6 && d > -1e-6 && $10 > 1.5 && $11 > 1.5 } END { exit !good }' $tmp/v2b/log.csv; then ok; else
    bad "train: V2's losses: the loss is not their sum"
fi
cp $tmp/v2b/balance.svg $tmp/out
shows "train: V2's losses: a picture" '>communication<'
trains "V2, one loss" $v2small --out $tmp/v2g --alpha-comm 0.25
equal "train: one of V2's losses" "$(head -n 1 $tmp/v2g/log.csv | cut -d, -f 9-) $(awk -F, 'NR == 2 { print NF }' $tmp/v2g/log.csv)" \
    "val_main,communication 10"
# A log of a version that did not have these columns.
cut -d, -f 1-9 $tmp/v2b/log.csv > $tmp/a && cp $tmp/a $tmp/v2b/log.csv
trains "--resume with a log of fewer columns" --resume --steps 2 --out $tmp/v2b
equal "train --resume: a log of fewer columns" "$(grep -c warning $tmp/err) $(awk -F, '{ printf "%d ", NF }' $tmp/v2b/log.csv)" "0 11 11 11 "
equal "train --resume: its rows" "$(sed -n 2p $tmp/v2b/log.csv)" "$(sed -n 2p $tmp/a),,"
differ "train --alpha-device" $tmp/v2a/model.safetensors $tmp/v2b/model.safetensors
trains "V2, by scores" $v2small --out $tmp/v2c --alpha-loads scores
differ "train --alpha-loads" $tmp/v2a/model.safetensors $tmp/v2c/model.safetensors
trains "V2, other devices" $v2small --out $tmp/v2d --alpha-device 0.5 --devices 1
differ "train --devices" $tmp/v2b/model.safetensors $tmp/v2d/model.safetensors
run train $v2small --out $tmp/v2e --bias-speed 0.1
equal "train --bias-speed without biases" "$status $(grep -c 'warning: --bias-speed: has no effect' $tmp/err)" "0 1"
run train $v2small --out $tmp/v2f --bias-freeze 0.1
equal "train --bias-freeze without biases" "$status $(grep -c 'warning: --bias-freeze: has no effect' $tmp/err)" "0 1"
refused "train --devices" "--devices: expected a divisor of the 8 experts, found 3" train $recipe --out $tmp/t --alpha-device 1 --devices 3
refused "train --most-devices" "--most-devices: expected 1 to 4, as many as there are (--devices), found 5" \
    train $recipe --out $tmp/t --alpha-comm 1 --devices 4 --most-devices 5
run train $v2small --out $tmp/v2h --devices 2
equal "train --devices without a loss" "$status $(grep -c 'warning: --devices: has no effect' $tmp/err)" "0 1"
refused "train --most-devices, --alpha-device" "--most-devices: expected 1 to 4, as many as there are (--devices), found 5" \
    train $recipe --out $tmp/t --alpha-device 1 --devices 4 --most-devices 5
run train $recipe --out $tmp/v2i --steps 1 --alpha-device 1 --devices 4 --most-devices 2
equal "train --most-devices without its loss" "$status $(grep -c 'warning: --most-devices: has no effect without --alpha-comm$' $tmp/err)" "0 1"
run train --resume --steps 2 --out $tmp/v2i --devices 4
equal "train --resume --devices" "$status $(grep -c warning $tmp/err)" "0 0"
# A model without experts: what has no effect is told once, by its name, and does nothing.
sed 's/"first_k_dense_replace": *[0-9]*/"first_k_dense_replace": 9/' $micro/config.json > $tmp/dense.json
dense="--config $tmp/dense.json --text $tmp/train.txt --seq 12 --batch 2 --threads 1 --steps 1"
trains "no experts" $dense --out $tmp/dense0
for option in alpha-device alpha-comm; do
    run train $dense --$option 1 --devices 3 --out $tmp/dense_$option
    equal "train --$option without experts" "$status $(grep -c warning $tmp/err)" "0 1"
    if grep -q "warning: --$option: has no effect: the model has no experts" $tmp/err; then ok; else fail "train --$option"; fi
    same "train --$option without experts: the log" $tmp/dense0/log.csv $tmp/dense_$option/log.csv
done
run train $dense --alpha 1 --out $tmp/dense_alpha
equal "train --alpha without experts" "$status $(grep -c 'warning: --alpha: has no effect' $tmp/err)" "0 1"
refused "train --alpha-loads" "--alpha-loads: expected scores or routing, found 'x'" train $recipe --out $tmp/t --alpha-loads x

# A state that is not what was written: which file, what of it, and all stays as it is.
trains "V2, twice" $v2small --steps 2 --bias-speed 0.001 --ema 0.5 --out $tmp/state
cp $tmp/state/train.safetensors $tmp/state.whole
cp $tmp/state/log.csv $tmp/state.log
run train --resume --out $tmp/state
equal "train --resume: no word about options that were not given" "$status $(grep -c warning $tmp/err)" "0 0"
header=$(($(od -An -v -tu1 -N 3 $tmp/state.whole | awk '{ print $1 + 256 * $2 + 65536 * $3 }') + 8))
bytes=$(wc -c < $tmp/state.whole | tr -d ' ')
# spoilt NAME TEXT: --resume refuses what is there, naming it, and changes nothing.
spoilt() {
    cp $tmp/state/train.safetensors $tmp/state.before
    refused "train --resume: $1" "$tmp/state/train.safetensors: $2" train --resume --out $tmp/state --steps 5
    if cmp -s $tmp/state.before $tmp/state/train.safetensors && cmp -s $tmp/state.log $tmp/state/log.csv; then ok; else
        bad "train --resume: $1: something was written"
    fi
    cp $tmp/state.whole $tmp/state/train.safetensors
}
# flipped OFFSET BIT TEXT
flipped() {
    byte=$(($(od -An -v -tu1 -j "$1" -N 1 $tmp/state.whole) ^ (1 << $2)))
    printf "$(printf '\\%03o' $byte)" | dd of=$tmp/state/train.safetensors bs=1 seek="$1" conv=notrunc 2> /dev/null
    spoilt "bit $2 of byte $1" "$3"
}
flipped 0 0 ''
flipped 1 7 ''
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do # of the metadata, then of what the header says of tensors
    flipped $((8 + i * 379)) $((i % 8)) ''
    flipped $((header - i * 2003)) $((i % 8)) ''
done
for i in 1 2 3 4 5 6 7 8; do flipped $((header + (bytes - header) / 9 * i)) $((i - 1)) ''; done
flipped $((header + 3)) 5 'loads is damaged: expected checksum '
flipped $((bytes - 1)) 0 'is damaged: what it says of the run, or checksums: expected checksum '
# respelt NAME TEXT SED: the header changed; of the same length
respelt() {
    { head -c 8 $tmp/state.whole && printf '%s' "$(head -c $header $tmp/state.whole | tail -c +9 | sed "$3")" &&
        tail -c +$((header + 1)) $tmp/state.whole; } > $tmp/state/train.safetensors
    equal "train --resume: $1: as long" "$(wc -c < $tmp/state/train.safetensors | tr -d ' ')" "$bytes"
    spoilt "$1" "$2"
}
respelt "another option" 'is damaged: what it says of the run' 's/"--lr":"0.003"/"--lr":"0.004"/'
respelt "a tensor under another name" 'm.model.norm.weight is missing' 's/"m\.model\.norm\.weight"/"m.model.norm.weighs"/'
respelt "another shape" 'm.model.layers.0.self_attn.q_b_proj.weight: expected F32 [96, 24], found F32 [24, 96]' \
    's/\("m\.model\.layers\.0\.self_attn\.q_b_proj\.weight":{"dtype":"F32","shape":\[\)96,24/\124,96/'
respelt "a type of no name" 'm.model.norm.weight: expected F32 [48], found X32 [48]' \
    's/\("m\.model\.norm\.weight":{"dtype":"\)F32/\1X32/'
respelt "another type" 'm.model.norm.weight: expected F32 [48], found I32 [48]' \
    's/\("m\.model\.norm\.weight":{"dtype":"\)F32/\1I32/'
respelt "no checksum" 'is damaged: checksum is missing' 's/"checksum":/"checksun":/'
respelt "no checksums" 'is damaged: checksums is missing' 's/"checksums":/"checksunz":/'
# One of 0.1 has none: it is loaded, with a warning; and what can be looked at without them is.
sums=$(head -c $header $tmp/state.whole | grep -ao '"checksums":{"dtype":"U64","shape":\[[0-9]*' | grep -o '[0-9]*$')
blanks() { printf '%*s' "$1" ''; }
aged() { # SED: as 0.1 wrote it, and changed
    { head -c 8 $tmp/state.whole && printf '%s' "$(head -c $header $tmp/state.whole | tail -c +9 |
        sed -e "s/,\"checksum\":\"[0-9a-f]*\"/$(blanks 30)/;s/,\"checksums\":{[^}]*}/$tail/" -e "$1")" &&
        tail -c +$((header + 1)) $tmp/state.whole | head -c -$((8 * sums)); } > $tmp/state/train.safetensors
}
tail=$(blanks "$(head -c $header $tmp/state.whole | grep -ao ',"checksums":{[^}]*}' | tr -d '\n' | wc -c)")
aged ''
run train --resume --out $tmp/state
equal "train --resume: a state of 0.1" "$status $(grep -c 'warning: .*train.safetensors: has no checksums' $tmp/err)" "0 1"
same "train --resume: a state of 0.1 gets its checksums" $tmp/state.whole $tmp/state/train.safetensors
old() { aged "$3" && spoilt "0.1: $1" "$2"; }
# But for the line of warning, which `refused` would not take.
spoilt() {
    run train --resume --out $tmp/state --steps 5
    if [ $status = 1 ] && [ "$(grep -vc 'has no checksums' $tmp/err)" = 1 ] &&
        grep -qF -e "$tmp/state/train.safetensors: $2" $tmp/err; then ok; else fail "train --resume: $1: '$2'"; fi
    cp $tmp/state.whole $tmp/state/train.safetensors
}
old "steps" 'trained and skipped: expected together 2, the steps done, found 2 and 1' 's/"skipped":"0"/"skipped":"1"/'
old "more steps than are to be" 'step: expected at most 2, its --steps, found 3' \
    's/"step":"2"/"step":"3"/;s/"skipped":"0"/"skipped":"1"/'
old "phases" 'phases: expected 1 to 1000000000 steps, found 0' 's/"phases":"2"/"phases":"0"/'
old "best" "best: expected a finite number, found 'x." 's/"best":"5/"best":"x/'
old "best step" 'best step: expected at most 2, the steps done, found 9' 's/"best step":"2/"best step":"9/'
old "an option" "--lr: expected a number, found '0.0x3'" 's/"--lr":"0.003"/"--lr":"0.0x3"/'
old "a flag" "--ids: expected 0 or 1, found '2'" 's/"--ids":"1"/"--ids":"2"/'
old "a value" "--schedule: expected v3 or cosine, found 'v4'" 's/"--schedule":"v3"/"--schedule":"v4"/'
# 1.5 and infinity, the last numbers of weights, moments and average: NaN has more bits than these.
for where in 'ema.model.norm.weight' 'v.model.norm.weight'; do
    at=$(head -c $header $tmp/state.whole | grep -ao "\"$where\":{[^}]*" | sed 's/.*offsets":\[\([0-9]*\).*/\1/')
    aged ''
    printf '\000\000\200\377' | dd of=$tmp/state/train.safetensors bs=1 seek=$((header + at + 4)) conv=notrunc 2> /dev/null
    spoilt "0.1: minus infinity in $where" "$where: element 1: expected a finite number"
done
aged ''
printf '\000\000\200\277' | dd of=$tmp/state/train.safetensors bs=1 seek=$((header + at + 4)) conv=notrunc 2> /dev/null
spoilt "0.1: a square below 0" "v.model.norm.weight: element 1: expected a finite number of at least 0, found -1"
rm $tmp/state/log.csv
trains "--resume without log.csv" --resume --out $tmp/state
equal "train --resume without log.csv is told" "$(grep -c 'warning: .*log.csv: does not exist; it begins anew behind step 2' $tmp/err)" 1
sed 3d $tmp/state.log > $tmp/state/log.csv
trains "--resume with a short log.csv" --resume --out $tmp/state
equal "train --resume with a short log.csv is told" "$(grep -c 'warning: .*log.csv: expected rows up to step 2, found them up to 1' $tmp/err)" 1

# NaN in --init: the file, the tensor, and nothing is made.
trains "for a bad --init" $recipe --steps 1 --out $tmp/bad_init
{ head -c -4 $tmp/bad_init/model.safetensors && printf '\000\000\300\177'; } > $tmp/a && mv $tmp/a $tmp/bad_init/model.safetensors
refused "train --init with NaN" "$tmp/bad_init/model.safetensors: model." train --init $tmp/bad_init --text $tmp/train.txt --seq 12 --out $tmp/t
if grep -q 'element [0-9]* is not finite$' $tmp/err; then ok; else fail "train --init with NaN: what"; fi
if [ -e $tmp/t ]; then bad "train --init with NaN: a directory"; else ok; fi

# ---- Documents, prompts, epochs, validation, what is kept

# A loss that no border changes: both have the same targets, and only what is seen before them differs.
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do printf 'Q: %s and %s? A: it is %s.\n' $i $i $((2 * i)); done > $tmp/qa
qa="--preset micro --text $tmp/qa --seq 64 --batch 2 --steps 2 --threads 1 --val 0"
trains "joined" $qa --out $tmp/run_joined
trains "--separator" $qa --out $tmp/run_parted --separator '\n'
differ "train --separator: losses" $tmp/run_joined/log.csv $tmp/run_parted/log.csv
trains "--apart" $qa --out $tmp/run_apart --separator '\n' --apart
differ "train --apart: losses" $tmp/run_parted/log.csv $tmp/run_apart/log.csv
trains "--loss-from" $qa --out $tmp/run_answers --separator '\n' --loss-from 'A: '
differ "train --loss-from" $tmp/run_parted/log.csv $tmp/run_answers/log.csv
trains "--loss-to" $qa --out $tmp/run_some --separator '\n' --loss-from 'A: ' --loss-to 'is'
differ "train --loss-to" $tmp/run_some/log.csv $tmp/run_answers/log.csv
trains "resumed" --resume --out $tmp/run_answers --steps 3
refused "train --resume: another separator" "--separator: expected '\\n', as the run" train --resume --out $tmp/run_answers --separator x
refused "train --loss-from: nowhere" "--loss-from: is nowhere in the text" train $qa --out $tmp/t --loss-from zzz
misused "train --loss-to alone" "--loss-to: expected --loss-from" train $qa --out $tmp/t --loss-to A
run train $qa --out $tmp/run_nowhere --separator zzz
equal "train --separator: nowhere" "$status $(grep -c 'warning: --separator: is nowhere' $tmp/err)" "0 1"
# What is before a document does not reach it: two texts that differ in their first document alone have, apart, the same
# losses in validation, where only the second one has targets.
{ printf 'aaaaaaaa\n' && printf 'Q A: the same answer as before\n'; } > $tmp/val1
{ printf 'zyxwvuts\n' && printf 'Q A: the same answer as before\n'; } > $tmp/val2
for how in apart across; do
    for k in 1 2; do
        extra=
        [ $how = apart ] && extra=--apart
        trains "--val-text, $how" $qa --val-every 2 --separator '\n' --loss-from 'A: ' $extra --val-text $tmp/val$k --out $tmp/$how$k
        awk -F, 'END { print $10, $11 }' $tmp/$how$k/log.csv > $tmp/$how$k.val
    done
done
same "train --apart: nothing crosses" $tmp/apart1.val $tmp/apart2.val
differ "train: without it, it does" $tmp/across1.val $tmp/across2.val
same "train: the text trained on is the same" $tmp/apart1/model.safetensors $tmp/apart2/model.safetensors
# The loss is that of the answer's tokens alone: what the scores of prompt with and without answer make of it.
total() { # TEXT: the nats of all its tokens but the first
    printf '%s' "$1" > $tmp/a
    "$tool" score $micro $tmp/a | awk -v n="$(wc -c < $tmp/a)" '/^nats.token/ { print $2 * (n - 1) }'
}
# validates NAME TEXT WANT OPTIONS...: the validation loss of the trained model, which no step changes.
validates() {
    what=$1 want=$3
    printf '%s' "$2" > $tmp/val
    shift 3
    rm -rf $tmp/run_val
    trains "$what" --init $micro --text $tmp/train.txt --val-text $tmp/val --seq 96 --batch 1 --steps 1 --lr 0 --bias-speed 0 \
        --threads 1 --out $tmp/run_val "$@"
    if awk -F, -v want="$want" 'END { d = $10 - want; exit !(d < 2e-3 && d > -2e-3 && want > 0.1) }' $tmp/run_val/log.csv; then ok; else
        bad "$what: $(tail -n 1 $tmp/run_val/log.csv) is not $want"
    fi
}
number() { awk "BEGIN { print $1 }"; }
p='It is a truth universally ' a='acknowledged, that a single man'
want=$(number "($(total "$p$a") - $(total "$p")) / ${#a}")
validates "the loss of an answer" "$p$a" "$want" --loss-from 'universally '
b=' in possession of a good ' c='fortune'
want=$(number "($(total "$p$a$b$c") - $(total "$p$a$b") + $(total "$p$a in") - $(total "$p")) / (${#a} + ${#c} + 3)")
validates "the loss of two answers" "$p$a$b$c" "$want" --loss-from 'universally ' --loss-from 'good ' --loss-to ' in'
validates "a prompt behind the border" "$p$a;$b$c" "$(number "($(total "$p$a;") - $(total "$p")) / (${#a} + 1)")" \
    --loss-from 'universally ' --loss-from ';' --separator ';'
n=$((${#p} + ${#a}))
whole_text="$p$a$b$c"
want=$(number "($(total "$whole_text") - $(total "$p$a ") + $(total "$p$a")) / ($n + ${#b} + ${#c} - 2)")
validates "no loss across a border" "$whole_text" "$want" --separator 'single man'
want=$(number "($(total "$p$a") + $(total "$b$c")) / ($n + ${#b} + ${#c} - 2)")
validates "each document alone" "$whole_text" "$want" --separator 'single man' --apart
refused "train --val-text: too short" "--val-text: expected at least 2 tokens, found 0" train $qa --out $tmp/t --val-text /dev/null
refused "train --val-text: missing" "$tmp/none: cannot be opened" train $qa --out $tmp/t --val-text $tmp/none

# Epochs: each token once in each. The mean loss of one, over weights that stay, does not depend on the order; that of as many
# sequences from anywhere does.
head -c 1633 examples/text/austen.txt > $tmp/t1633 # 102 windows of 16 tokens, and one more token
means() { # NAME OPTION VALUE: the mean losses of three seeds, and how many are different
    for seed in 1 2 3; do
        trains "$1" --init $micro --text $tmp/t1633 --val 0 --seq 16 --batch 6 --lr 0 --bias-speed 0 --threads 1 --seed $seed \
            "$2" "$3" --out $tmp/run_"$1"$seed
        awk -F, 'NR > 1 { sum += $5 } END { printf "%.4f %d\n", sum / (NR - 1), NR - 1 }' $tmp/run_"$1"$seed/log.csv
    done | sort -u | tee $tmp/a | wc -l | tr -d ' '
}
equal "train --epochs: each token once" "$(means epochs --epochs 1) $(cut -d ' ' -f 2 $tmp/a | sort -u)" "1 17"
equal "train --steps: from anywhere" "$(means steps --steps 17)" 3
differ "train --epochs: another order" $tmp/run_epochs1/log.csv $tmp/run_epochs2/log.csv
awk 'BEGIN { for (i = 0; i < 97; i++) printf "%d ", i }' > $tmp/ids97
epochs="--config $tmp/v128 --ids --text $tmp/ids97 --val 0 --seq 8 --batch 4 --threads 1"
trains "--epochs 1" $epochs --epochs 1 --out $tmp/epoch1
equal "train --epochs: steps" "$(tail -n 1 $tmp/epoch1/log.csv | cut -d, -f 1)" 3
trains "--epochs 2" --resume --out $tmp/epoch1 --epochs 2
equal "train --epochs: more" "$(tail -n 1 $tmp/epoch1/log.csv | cut -d, -f 1)" 6
misused "train --steps and --epochs" "--steps and --epochs exclude each other" train $epochs --steps 1 --epochs 1 --out $tmp/t
refused "train --resume --epochs: of another order" "--epochs: the run draws its sequences from anywhere" \
    train --resume --out $tmp/run_joined --epochs 2
refused "train --warmup with --epochs" "--warmup: expected at most 3, the steps, found 4" train $epochs --epochs 1 --warmup 4 --out $tmp/t

# Tokens are kept as bytes, 16 or 32 bits, as the vocabulary wants: the same ids are the same text.
for V in 256 300 70000; do
    sed "s/\"vocab_size\": 128/\"vocab_size\": $V/; s/\"hidden_size\": 64/\"hidden_size\": 16/" $tmp/v128/config.json > $tmp/v$V.json
    trains "a vocabulary of $V" --config $tmp/v$V.json --ids --text $tmp/ids97 --seq 8 --batch 1 --steps 1 --threads 1 --out $tmp/run_v$V
done
equal "train: bytes and 16 bits" "$(state run_v256 'text hash')" "$(state run_v300 'text hash')"
equal "train: bytes and 32 bits" "$(state run_v256 'text hash')" "$(state run_v70000 'text hash')"
if state run_v256 'text hash' | grep -q '^[1-9][0-9]*$'; then ok; else bad "train: no hash of the text"; fi
awk 'BEGIN { for (i = 0; i < 90; i++) printf "%d ", 299 - i }' > $tmp/ids299
for V in 300 70000; do
    trains "larger ids, $V" --config $tmp/v$V.json --ids --text $tmp/ids299 --seq 8 --batch 1 --steps 1 --threads 1 --out $tmp/run_w$V
done
# A tensor beyond 1 MiB is told from another by samples, which are nearer to each other than 4096 bytes here.
large="generate $tmp/run_w70000 --ids -p 1,2,3 -n 2 --attention absorbed --prompt-cache $tmp/large"
good "--prompt-cache, large tensors" $large
good "--prompt-cache, large tensors, again" $large
dd if=/dev/zero of=$tmp/run_w70000/model.safetensors bs=4096 count=1 conv=notrunc \
    seek=$(($(wc -c < $tmp/run_w70000/model.safetensors) / 4096 / 4)) 2> /dev/null
refused "--prompt-cache, large tensors that are others" "$tmp/large: tag: is not what was saved" $large
equal "train: 16 and 32 bits" "$(state run_w300 'text hash')" "$(state run_w70000 'text hash')"

# What is kept, and when it ends.
trains "--keep-last" $recipe --steps 12 --save-every 2 --keep-last 3 --keep-best --out $tmp/run_kept
equal "train --keep-last: which" "$(ls -d $tmp/run_kept/step-* | sed 's/.*step-//' | sort -n | tr '\n' ' ')" "8 10 12 "
same "train --keep-last: the last" $tmp/run_kept/step-12/model.safetensors $tmp/run_kept/model.safetensors
good "train --keep-last: a checkpoint" score $tmp/run_kept/step-8 $tmp/part
best=$(awk -F, '$10 != "" && NR > 1 && (low == "" || $10 < low) { low = $10; at = $1 } END { print at }' $tmp/run_kept/log.csv)
equal "train --keep-best" "$(state run_kept 'best step')" "$best"
good "train --keep-best: a checkpoint" score $tmp/run_kept/best $tmp/part
mkdir $tmp/run_kept/step-1 && touch $tmp/run_kept/step-1/mine
trains "--keep-last, another's folder" --resume --out $tmp/run_kept --steps 14
if [ -e $tmp/run_kept/step-1/mine ] && [ ! -e $tmp/run_kept/step-8 ]; then ok; else bad "train --keep-last: another's file"; fi
mkdir $tmp/run_kept/step-99
trains "--keep-last, a later run's folder" --resume --out $tmp/run_kept --steps 16
equal "train --keep-last: a later run's folder" "$(ls -d $tmp/run_kept/step-* | sed 's/.*step-//' | sort -n | tr '\n' ' ')" "1 12 14 16 99 "
trains "--patience" $recipe --steps 60 --lr 0 --bias-speed 0 --patience 2 --out $tmp/run_patient
equal "train --patience: it ends" "$(tail -n 1 $tmp/run_patient/log.csv | cut -d, -f 1)" 12
if grep -q 'has ended at step 12: 2 validations were no better than [0-9.]* at step 4' $tmp/err; then ok; else fail "train --patience"; fi
if grep -q "; go on with: dsv3 train --resume --patience 0 --out $tmp/run_patient" $tmp/err; then ok; else
    fail "train --patience: how it goes on"
fi
trains "--patience: again" --resume --out $tmp/run_patient
equal "train --patience: it has ended" "$(tail -n 1 $tmp/run_patient/log.csv | cut -d, -f 1)" 12
trains "--patience 3" --resume --out $tmp/run_patient --patience 3
equal "train --patience: with more" "$(tail -n 1 $tmp/run_patient/log.csv | cut -d, -f 1)" 16
trains "--patience: another text" --resume --out $tmp/run_patient --patience 3 --val-text $tmp/val
if grep -q 'validation reads another text than before' $tmp/err; then ok; else fail "train: validation by another text"; fi
refused "train --patience without validation" "--patience: expected a text for validation" train $recipe --val 0 --patience 1 --out $tmp/t
refused "train --keep-best without validation" "--keep-best: expected a text for validation" train $recipe --val 0 --keep-best --out $tmp/t
# A copy that cannot be written loses no step.
trains "--keep-best" $recipe --out $tmp/run_copy --steps 4 --val-every 4 --keep-best
rm -rf $tmp/run_copy/best
mkdir -p $tmp/run_copy/best/model.safetensors
copy_step=$(state run_copy step)
run train --resume --out $tmp/run_copy --steps 8 --save-every 100
equal "train --keep-best: it cannot be written" "$status $copy_step $(state run_copy step)" "1 4 8"
if grep -q "$tmp/run_copy/best/model.safetensors: cannot replace" $tmp/err; then ok; else fail "train --keep-best: no line"; fi
equal "train --keep-best: it is not the best" "$(state run_copy 'best step')" 4
rm -rf $tmp/run_copy/best
: > $tmp/run_copy/best
run train --resume --out $tmp/run_copy --steps 12
equal "train --keep-best: a file is in the way" "$status $(state run_copy step) $(state run_copy 'best step')" "1 12 4"
if grep -q "$tmp/run_copy/best: is not a directory" $tmp/err; then ok; else fail "train --keep-best: a file is in the way"; fi
rm $tmp/run_copy/best
trains "--keep-best, again" --resume --out $tmp/run_copy --steps 16
equal "train --keep-best: the next one" "$(state run_copy 'best step')" 16
same "train --keep-best: it is kept" $tmp/run_copy/best/model.safetensors $tmp/run_copy/model.safetensors

# By the clock: a run that is killed has not lost all.
"$tool" train $recipe --out $tmp/run_clock --steps 100000 --save-every 1000000 --save-minutes 0.001 > $tmp/out 2> $tmp/err &
child=$!
for try in $(seq 100); do
    [ "$(state run_clock step 2> /dev/null)" -gt 2 ] 2> /dev/null && break
    sleep 0.05
done
kill -9 $child 2> /dev/null
wait $child 2> /dev/null
if [ "$(state run_clock step)" -gt 2 ]; then ok; else bad "train --save-minutes: step $(state run_clock step)"; fi
# A limit of processor time is an end like others.
(
    ulimit -St 1
    "$tool" train $recipe --out $tmp/run_limit --steps 100000 --save-every 1000000 > $tmp/out 2> $tmp/err
)
equal "train: ulimit -t: status" $? 0
if grep -q "stopped and saved after step $(state run_limit step); go on with" $tmp/err; then ok; else fail "train: ulimit -t"; fi
if [ -e $tmp/t ]; then bad "train: a directory from an error"; else ok; fi

# ---- Checkpoints as they are found

# edit FROM TO SED: a checkpoint with names or types of tensors changed, each to one of the same length.
edit() {
    rm -rf "${tmp:?}/$2"
    mkdir $tmp/"$2"
    cp "$1"/config.json $tmp/"$2"
    edit_n=$(($(od -An -v -tu1 -N 3 "$1"/model.safetensors | awk '{ print $1 + 256 * $2 + 65536 * $3 }') + 8))
    { head -c 8 "$1"/model.safetensors && printf '%s' "$(head -c $edit_n "$1"/model.safetensors | tail -c +9 | sed "$3")" &&
        tail -c +$((edit_n + 1)) "$1"/model.safetensors; } > $tmp/"$2"/model.safetensors
}
v3=tests/golden/v3 # three layers and two modules
fp8=tests/golden/v3_fp8
head -c 300 examples/text/austen.txt > $tmp/t300
# Fewer modules than config.json names, and modules under other names.
edit $v3 mtp0 's/model\.layers\.3\./mtp.0.xxxxxxxx./g;s/model\.layers\.4\./mtp.1.xxxxxxxx./g'
edit $v3 mtp1 's/model\.layers\.4\./model.layers.9./g'
edit $v3 mtp2 's/model\.layers\.3\./model.layers.9./g'
for k in 0 1 2; do
    have=$((k % 2))
    run train --init $tmp/mtp$k --text $tmp/t300 --out $tmp/init$k --steps 2 --seq 16 --batch 1 --threads 1
    equal "train --init, modules of file $k" "$status $(head -n 1 $tmp/init$k/log.csv | tr ',' '\n' | grep -c '^mtp')" "0 $have"
    if grep -q "^dsv3: $tmp/mtp$k has $have of the 2 MTP modules that its config.json names; so has the run$" $tmp/err
    then ok; else fail "train --init, modules of file $k: no line"; fi
    if grep -q "^dsv3: warning: $tmp/mtp$k: [0-9]* tensors are not part of this model, and not used: m" $tmp/err; then ok; else
        fail "train --init, modules of file $k: stray tensors"
    fi
    good "train --init, modules of file $k: the result" score $tmp/init$k $tmp/t300
    run train --resume --out $tmp/init$k
    equal "train --init, modules of file $k: resumed" $status 0
done
# Every command that opens it says so, in one line, and still works.
for command in "score $tmp/mtp0 $tmp/t300" "route $tmp/mtp0 $tmp/t300" "generate $tmp/mtp0 -n 2 -p x" "inspect $tmp/mtp0" \
    "convert $tmp/mtp0 $tmp/mtp0c --type F32"; do
    run $command
    equal "stray tensors: $command" "$status $(wc -l < $tmp/err | tr -d ' ') $(grep -c 'not used: mtp.0.xxxxxxxx' $tmp/err)" "0 1 1"
done
good "stray tensors: converted away" score $tmp/mtp0c $tmp/t300
# Types that are not known here.
edit $v3 c64 's/"model.norm.weight": *{"dtype": *"F32"/"model.norm.weight":{"dtype":"C64"/'
edit $v3 other 's/"model.layers.4.eh_proj.weight"\(: *{"dtype": *"\)F32"/"other.layers.4.eh_proj.weight"\1F4X"/;s/model\.layers\.4\./other.layers.4./g'
for name in c64 other; do
    run inspect $tmp/$name
    equal "inspect: another type: $name" "$status" 0
done
run inspect $tmp/c64
shows "inspect: another type" '^model.norm.weight  *C64  *\[[0-9]*\]  *-  *-  *-  *-$'
run inspect $tmp/c64 --check-finite
equal "inspect: another type, --check-finite" "$status $(grep -c 'the values of 1 tensor are of types' $tmp/err)" "0 1"
everywhere "another type" "$tmp/c64: model.norm.weight: expected the type F32, F16, BF16 or F8_E4M3, found C64" $tmp/c64
safetensors $tmp/bad.safetensors '{"w":{"dtype":"F8_E4M3","shape":[1,1],"data_offsets":[0,1]},"w_scale_inv":{"dtype":"F32",
"shape":[1,1],"data_offsets":[1,5]}}' '\070\0\0\200\277'
refused_status() { equal "$1" "$status $(cat $tmp/err)" "$2"; }
run inspect $tmp/bad.safetensors --check-finite
refused_status "inspect: a negative scale" "1 dsv3: w_scale_inv: scale 0 is not positive"
# FP8 output says what is true of it, whatever the input said.
good "convert to FP8" convert tests/golden/v3_bf16 $tmp/q0 --type F8_E4M3
tr -d ' \n' < $tmp/q0/config.json | sed 's/.*"quantization_config":\({[^}]*}\).*/\1/' > $tmp/q0.json
for q in '{}' '{"quant_method":"fp8","activation_scheme":"static","weight_block_size":null}' \
    '{"quant_method":"fp8","weight_block_size":[128,128],"modules_to_not_convert":["model.layers.0.self_attn.o_proj"]}' \
    '{"quant_method":"fp8","fmt":"e4m3","scale_fmt":"ue8m0","weight_block_size":[128,128]}' '{"group_size":64,"bits":4}' null; do
    rm -rf $tmp/q1 $tmp/q2
    mkdir $tmp/q1
    cp tests/golden/v3_bf16/model.safetensors $tmp/q1
    sed "1s|{|{\"quantization_config\": $q,|" tests/golden/v3_bf16/config.json > $tmp/q1/config.json
    good "convert to FP8 from $q" convert $tmp/q1 $tmp/q2 --type F8_E4M3
    tr -d ' \n' < $tmp/q2/config.json | sed 's/.*"quantization_config":\({[^}]*}\).*/\1/' > $tmp/q2.json
    same "convert to FP8 from $q" $tmp/q0.json $tmp/q2.json
    same "convert to FP8 from $q: weights" $tmp/q0/model.safetensors $tmp/q2/model.safetensors
done
# RoPE: of two objects the older one counts; what changes frequencies does, or is refused.
rope() { # NAME SED: a copy of v3 whose config.json is changed
    rm -rf "${tmp:?}/rope_$1"
    mkdir $tmp/"rope_$1"
    cp $v3/model.safetensors $tmp/"rope_$1"
    sed "$2" $v3/config.json > $tmp/"rope_$1"/config.json
}
rope yarn ''
rope both '1s/{/{"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},/'
rope truncate 's/"rope_scaling": {/"rope_scaling": {"truncate": false,/'
rope partial 's/"rope_scaling": {/"rope_scaling": {"partial_rotary_factor": 0.5,/'
rope llama4 's/"rope_scaling": {/"rope_scaling": {"llama_4_scaling_beta": 0.1,/'
for name in yarn both truncate; do score_of $name $tmp/rope_$name > $tmp/rope_$name.score; done
same "rope_scaling beside rope_parameters" $tmp/rope_yarn.score $tmp/rope_both.score
everywhere "partial_rotary_factor" "partial_rotary_factor: must be 1 or absent" $tmp/rope_partial
everywhere "llama_4_scaling_beta" "llama_4_scaling_beta: must be 0 or absent" $tmp/rope_llama4

# What is no checkpoint says what it is.
copy strange
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n' > $tmp/strange/model.safetensors
everywhere "an LFS pointer" "$tmp/strange/model.safetensors: is a pointer of Git LFS" $tmp/strange
printf '<!DOCTYPE html><html></html>' > $tmp/strange/model.safetensors
everywhere "an HTML page" "$tmp/strange/model.safetensors: is a page of HTML" $tmp/strange
rm $tmp/strange/model.safetensors
ln -s nowhere $tmp/strange/model.safetensors
everywhere "a dangling link" "$tmp/strange/model.safetensors: is a link to a file that does not exist" $tmp/strange
rm $tmp/strange/model.safetensors
mkfifo $tmp/strange/model.safetensors
everywhere "a pipe" "$tmp/strange/model.safetensors: not a regular file" $tmp/strange
rm $tmp/strange/config.json
mkfifo $tmp/strange/config.json
everywhere "a pipe as config.json" "$tmp/strange/config.json: not a regular file" $tmp/strange
refused "plan: a pipe as config.json" "$tmp/strange/config.json: not a regular file" plan $tmp/strange
copy strange_generation
mkfifo $tmp/strange_generation/generation_config.json
everywhere "a pipe as generation_config.json" "generation_config.json: not a regular file" $tmp/strange_generation
mkfifo $tmp/strange/cache
refused "--prompt-cache: a pipe" "$tmp/strange/cache: not a regular file" generate $micro -n 3 --prompt-cache $tmp/strange/cache
rm $tmp/strange/config.json
printf '{"model_type": "kimi_k25", "text_config": {"hidden_size": 64}}' > $tmp/strange/config.json
everywhere "a wrapper" "text_config: this is a wrapper with the model inside" $tmp/strange
everywhere "a file of the checkpoint" "expected a checkpoint's directory, found a file" $micro/model.safetensors

# ---- Prompts from files, and what interrupts do

printf 'It is a\n\ntruth' > $tmp/prompt
text a -n 40 --temp 0 -p 'It is a\n\ntruth'
text b -n 40 --temp 0 -f $tmp/prompt
same "generate -f" $tmp/a $tmp/b
"$tool" generate $micro -n 40 --temp 0 -p - < $tmp/prompt > $tmp/b 2> $tmp/err
same "generate -p -" $tmp/a $tmp/b
text b -n 40 --temp 0 -f $tmp/prompt --echo
{ cat $tmp/prompt $tmp/a && echo; } > $tmp/c
same "generate -f --echo" $tmp/c $tmp/b
misused "generate -p and -f" "-p and -f exclude each other" generate $micro -p a -f $tmp/prompt
refused "generate -f: missing" "$tmp/none: cannot be opened" generate $micro -f $tmp/none
misused "generate -f without a value" "missing behind -f" generate $micro -f
"$tool" generate $micro -n 1000000000 --context 16000000 --stats > $tmp/out 2> $tmp/err &
child=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -s $tmp/out ] && break
    sleep 0.1
done
kill -INT $child 2> /dev/null
wait $child
equal "generate: Ctrl-C: status" $? 130
if grep -q '^text  *[0-9]* tokens' $tmp/err; then ok; else fail "generate: Ctrl-C: no --stats"; fi

said "chat: a conversation" 'My dear\nWhat is it?\nAnd then?\n' --temp 0 -n 50 --system 'Be brief.\n'
cp $tmp/out $tmp/b
printf "My dear\nWhat is it?\n/save $tmp/talk\n" | "$tool" chat $micro --temp 0 -n 50 --system 'Be brief.\n' > $tmp/out 2> $tmp/err
if grep -q "^dsv3: $tmp/talk: [0-9]* tokens saved$" $tmp/err; then ok; else fail "chat: /save"; fi
printf "Something else\n/load $tmp/talk\nAnd then?\n" | "$tool" chat $micro --temp 0 -n 50 --system 'Be brief.\n' > $tmp/out 2> $tmp/err
sed 1d $tmp/out > $tmp/c
sed -n 3p $tmp/b > $tmp/d
same "chat: /load goes on from there" $tmp/c $tmp/d
printf "/load $tmp/talk\n/undo\nMy dear\n/load $tmp/none\n/save $tmp/none/x\n/save\n/help\n" |
    "$tool" chat $micro --temp 0 -n 50 --system 'Be brief.\n' > $tmp/out 2> $tmp/err
equal "chat: status after wrong files" $? 0
sed -n 1p $tmp/b > $tmp/d
same "chat: /undo of /load" $tmp/d $tmp/out
for words in "$tmp/none: cannot be opened" "$tmp/none/x: cannot be written" "/save: expected /undo" "  /load FILE " \
    "the reply is cut at 50 tokens"; do
    if grep -qF -e "$words" $tmp/err; then ok; else fail "chat: '$words'"; fi
done
printf '1 2\nx\n3\n' | "$tool" chat $micro --ids -n 3 > $tmp/out 2> $tmp/err
equal "chat: a line that is no ids ends nothing" "$? $(wc -l < $tmp/out | tr -d ' ') $(grep -c 'expected token ids' $tmp/err)" "0 2 1"

good "plan: in all" plan micro
shows "plan: in all" "^in all, weights and cache F32 included  *[0-9]* "
equal "plan: it fits" "$(grep -c 'memory of this machine .* it fits$' $tmp/out)" "$(getconf _PHYS_PAGES > /dev/null 2>&1 && echo 1)"
good "plan: in all" plan kimi-k2
shows "plan: it does not fit" 'memory of this machine .* it does not fit$'

# ---- What is written, and what stays

# A run that cannot be read is a run.
mkdir $tmp/unread
ln -s nowhere $tmp/unread/train.safetensors
refused "train: a run that cannot be read" "$tmp/unread: holds a checkpoint already" train $recipe --steps 1 --out $tmp/unread
if [ -L $tmp/unread/train.safetensors ]; then ok; else bad "train: a run that cannot be read is gone"; fi
# Files of a run that lie elsewhere: the links stay, and what they lead to is written.
trains "its files elsewhere" $recipe --out $tmp/linked_run --steps 1
mkdir -p $tmp/elsewhere
for file in train.safetensors model.safetensors config.json log.csv; do
    mv $tmp/linked_run/$file $tmp/elsewhere/$file
    ln -s ../elsewhere/$file $tmp/linked_run/$file
done
trains "through links" --resume --steps 2 --out $tmp/linked_run
for file in train.safetensors model.safetensors config.json log.csv; do
    if [ -L $tmp/linked_run/$file ] && [ ! -L $tmp/elsewhere/$file ]; then ok; else bad "train: the link $file"; fi
done
equal "train: through links" "$(state linked_run step) $(ls $tmp/elsewhere | wc -l | tr -d ' ')" "2 4"
trains "before the log is a pipe" $recipe --out $tmp/piped_log --steps 1
rm $tmp/piped_log/log.csv
mkfifo $tmp/piped_log/log.csv
"$tool" train --resume --out $tmp/piped_log --steps 2 > $tmp/out 2> $tmp/err
equal "train: a pipe as log.csv" "$? $(grep -c "^dsv3: $tmp/piped_log/log.csv: not a regular file" $tmp/err)" "1 1"
# Two processes on one directory.
"$tool" train $recipe --steps 100000 --save-every 100000 --out $tmp/two_runs > $tmp/out 2> $tmp/b &
child=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -f $tmp/two_runs/model.safetensors ] && break
    sleep 0.1
done
refused "train: a second one" "another process is writing there ($child)" train --resume --out $tmp/two_runs
refused "train: a second run" "another process is writing there ($child)" train $recipe --out $tmp/two_runs
refused "convert into a run" "another process is writing there ($child)" convert $micro $tmp/two_runs --type F32
kill -INT $child
wait $child
equal "train: beside a second one" "$? $(ls -A $tmp/two_runs | grep -c -e lock -e tmp)" "0 0"
# What a killed process has left is removed, by the next one that has the lock; a link under such a name is not followed.
printf 'keep' > $tmp/target
ln -s ../target $tmp/two_runs/model.safetensors.4194999-0.tmp
: > $tmp/two_runs/mine.tmp
"$tool" train --resume --out $tmp/two_runs --threads 1 > $tmp/b 2>&1 &
child=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -L $tmp/two_runs/model.safetensors.4194999-0.tmp ] || break
    sleep 0.1
done
kill $child
wait $child
equal "leftovers" "$(cat $tmp/target) $(ls -A $tmp/two_runs | grep '4194999\|mine')" "keep mine.tmp"
# A picture that cannot be drawn is a warning, behind the weights.
mkdir $tmp/pictures
mkdir $tmp/pictures/loss.svg
trains "a picture that fails" $recipe --steps 2 --out $tmp/pictures
equal "train: a picture that fails" "$(grep -c "^dsv3: warning: $tmp/pictures/loss.svg: cannot be written: is a directory" $tmp/err)" 1
good "train: a picture that fails: the weights" score $tmp/pictures $tmp/part
# Over another model: both files, or neither.
rm -rf $tmp/over
mkdir $tmp/over
cp $fp8/model.safetensors $fp8/config.json $tmp/over
(
    ulimit -f 100
    "$tool" convert $micro $tmp/over --type F32 > $tmp/out 2> $tmp/err
)
equal "convert over a model, no room" "$? $(grep -c 'model.safetensors: cannot write: ' $tmp/err) $(ls -A $tmp/over | wc -l | tr -d ' ')" "1 1 2"
same "convert over a model, no room" $fp8/model.safetensors $tmp/over/model.safetensors
same "convert over a model, no room" $fp8/config.json $tmp/over/config.json
rm $tmp/over/config.json
mkdir $tmp/over/config.json
refused "convert: config.json is a directory" "$tmp/over/config.json: cannot be written: is a directory" \
    convert $micro $tmp/over --type F32
same "convert: config.json is a directory" $fp8/model.safetensors $tmp/over/model.safetensors
rmdir $tmp/over/config.json
good "convert over half a model" convert $micro $tmp/over --type BF16
good "convert over half a model: both" generate $tmp/over -n 3
equal "convert: nothing else" "$(ls -A $tmp/over | tr '\n' ' ')" "config.json model.safetensors "
# A limit on file sizes is an error, not a signal, and leaves nothing.
(
    ulimit -f 0
    "$tool" route $micro $tmp/part --csv $tmp/limited 2>&1 > /dev/null
    echo $?
) 2>&1 | cat > $tmp/out
equal "ulimit -f" "$(tail -n 1 $tmp/out) $(grep -c "^dsv3: $tmp/limited: cannot be written: " $tmp/out) $(ls $tmp/limited* 2> /dev/null)" "1 1 "

rm -rf $tmp
done_testing tool
